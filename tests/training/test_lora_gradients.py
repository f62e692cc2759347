"""Gradients of every low-rank factor are PEFT's: of attention, dense layers, shared and routed experts."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from model.adapters.lora_read import read_adapter
from model.adapters.spec import lora_tensors
from model.checkpoint import Checkpoint
from tests.training.rig import Doors, Rig, plans, samples
from tests.training.test_gradients import relative
from tests.training.test_result import STEPS, load, train, write

BATCH = samples(512, (30, 20), 1)


def gradients(rig: Rig) -> dict[str, Tensor]:
    """Of one more step, as they are before it is made."""
    seen: dict[str, Tensor] = {}
    coordinator = rig.workers[0]._coordinator
    assert coordinator is not None
    apply = coordinator.apply

    def keep_and_apply(*given: object) -> list[str]:
        seen.update({name: grad.clone() for name, grad in rig.expert_gradients().items()})
        seen.update({name: one.grad.clone() for name, one in rig.denses[0].trained.items() if one.grad is not None})
        return apply(*given)  # type: ignore[arg-type, return-value]

    coordinator.apply = keep_and_apply  # type: ignore[method-assign, assignment]
    rig.step(plans(STEPS, [[BATCH]], 1e-2))
    return seen


def peft_gradients(base: Path, adapter: Path, out: Path) -> Path:
    """An adapter whose numbers are gradients of the mean cross entropy over all targets."""
    model = peft.PeftModel.from_pretrained(load(base), adapter, is_trainable=True)
    for token_t, target_t in zip(BATCH.token_T.split(BATCH.lengths), BATCH.target_T.split(BATCH.lengths), strict=True):
        logits = model(token_t[None]).logits[0]
        (torch.nn.functional.cross_entropy(logits, target_t, reduction="sum") / BATCH.targets).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
    model.save_pretrained(out, save_embedding_layers=False)
    return out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_gradients_of_factors_are_pefts(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("mini")
    with closing(Doors(Checkpoint.open(base))) as doors:
        recipe, method, rig = train(base, doors, "lora")
        adapter = write(tmp_path, base, recipe, method, rig, doors)
        found = gradients(rig)
    config, spec = rig.checkpoint.config, method.lora
    assert spec is not None
    names = list(lora_tensors(config, spec))
    theirs = read_adapter(peft_gradients(base, adapter, tmp_path / "gradients"), config)
    wanted = dict(zip(names, theirs.matrices(names), strict=True))
    assert found.keys() == wanted.keys()
    worst = {name: relative(found[name], grad) for name, grad in wanted.items() if grad.norm() > 1e-7}
    assert len(worst) > 0.9 * len(names)
    assert max(worst.values()) < 1e-5, sorted(worst.items(), key=lambda item: -item[1])[:5]
