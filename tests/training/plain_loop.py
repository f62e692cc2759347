"""A single process's training with transformers and torch's optimizer, one sample after the other."""

from collections.abc import Sequence

import torch
from transformers import DeepseekV2ForCausalLM

from services.training.inputs import load_data
from services.training.recipe import Recipe


def plain_losses(
    recipe: Recipe,
    rates: Sequence[float],
    tokens: Sequence[int],
    betas: tuple[float, float],
    weight_decay: float,
    clip: float,
) -> list[float]:
    """Of steps with these learning rates and at most so many `tokens`, on the recipe's model and data; norms decay not.

    The recipe's own rates, batches and optimizer are not looked at.
    """
    model = DeepseekV2ForCausalLM.from_pretrained(
        recipe.model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    groups = [
        {"params": [one for one in model.parameters() if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in model.parameters() if one.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=betas)
    data, cursor = load_data(recipe), 0
    losses: list[float] = []
    for rate, most in zip(rates, tokens, strict=True):
        batch = data.batch(cursor, batch_tokens=most)
        cursor = batch.cursor_after
        optimizer.zero_grad()
        total = 0.0
        for index in batch.samples:
            token_T = torch.tensor(data.samples[index].ids.tolist())
            logits = model(token_T[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, token_T[1:], reduction="sum")
            (loss / batch.targets).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(total / batch.targets)
    return losses
