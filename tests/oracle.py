"""transformers' DeepSeek-V2 in fp32 with eager attention and experts: what the logits and tokens must be."""

from functools import cache
from pathlib import Path

import torch
from transformers import DeepseekV2ForCausalLM


@cache
def load(path: Path) -> DeepseekV2ForCausalLM:
    model = DeepseekV2ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    model.eval()
    return model


@torch.no_grad()
def logits(path: Path, tokens: list[int]) -> torch.Tensor:
    """[T, V] logits of one sequence."""
    return load(path)(torch.tensor([tokens])).logits[0]


@torch.no_grad()
def greedy_tokens(path: Path, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens after `prompt`, end tokens ignored."""
    model = load(path)
    ids = torch.tensor([prompt])
    out: list[int] = []
    past = None
    for _ in range(count):
        result = model(ids, past_key_values=past, use_cache=True)
        past = result.past_key_values
        ids = result.logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out
