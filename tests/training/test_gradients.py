"""Gradients of every parameter are transformers', however many hosts, workers and replicas take part."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2ForCausalLM

from attention.training.decoder import ForwardOptions, head_tokens
from attention.training.segments import MicroBatch
from experts.training.spec import ExpertTraining
from tests.training.rig import make_rig, plans, samples

LENGTHS = ([17, 9], [24, 5, 1])


def oracle_gradients(path: Path, batches: list[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Mean cross entropy over all targets, one sample at a time, and its gradients under checkpoint names."""
    model = DeepseekV2ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    targets = sum(batch.targets for batch in batches)
    total = 0.0
    for batch in batches:
        for token_t, target_t in zip(
            batch.token_T.split(batch.lengths), batch.target_T.split(batch.lengths), strict=True
        ):
            logits = model(token_t[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, target_t, reduction="sum") / targets
            if (target_t != -100).any():
                loss.backward()
                total += loss.item()
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            prefix, matrix = name.rsplit(".", 1)
            found |= {f"{prefix}.{expert}.{matrix}": each for expert, each in enumerate(grad)}
        else:
            found[name] = grad
    return total, found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


@pytest.fixture(scope="module", params=["tiny", "tiny-lite", "tiny-yarn"])
def case(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]
) -> tuple[Path, list[MicroBatch], float, dict[str, Tensor]]:
    path = checkpoint(request.param)
    batches = [samples(2048, lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    return path, batches, *oracle_gradients(path, batches)


@pytest.mark.parametrize(
    ("hosts", "replicas", "workers"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (2, 2, 1), (3, 2, 2), (5, 1, 1)]
)
def test_gradients_are_transformers(
    case: tuple[Path, list[MicroBatch], float, dict[str, Tensor]], hosts: int, replicas: int, workers: int
) -> None:
    path, batches, loss, wanted = case
    rig = make_rig(path, hosts, replicas, workers)
    seen: dict[str, Tensor] = {}

    def keep(hosts_: object, *rest: object) -> None:
        seen.update({name: grad.clone() for name, grad in rig.expert_gradients().items()})
        seen.update({name: one.grad.clone() for name, one in rig.denses[0].trained.items() if one.grad is not None})

    coordinator = rig.workers[0]._coordinator
    assert coordinator is not None
    apply = coordinator.apply
    coordinator.apply = lambda *given: (keep(*given), apply(*given))  # type: ignore[method-assign, assignment]
    spread = [batches] if workers == 1 else [[batches[0]], [batches[1]]]
    (report, *_) = rig.step(plans(0, spread))
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert seen.keys() == wanted.keys()
    worst = {name: relative(seen[name], grad) for name, grad in wanted.items() if grad.norm() > 1e-7}
    assert max(worst.values()) < 1e-5, sorted(worst.items(), key=lambda item: -item[1])[:5]
    assert report.grad_norm == pytest.approx(
        float(torch.stack([grad.norm() for grad in wanted.values()]).norm()), rel=1e-5
    )


def test_checkpointing_changes_no_gradient_bit(checkpoint: Callable[[str], Path]) -> None:
    batch = samples(2048, LENGTHS[0])
    norms = []
    for checkpointing, keeps in itertools.product((False, True), repeat=2):
        training = ExpertTraining("run", keeps=keeps)
        rig = make_rig(checkpoint("tiny"), training=training, options=ForwardOptions(checkpointing=checkpointing))
        norms.append(rig.step(plans(0, [[batch]]))[0].grad_norm)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("tokens", [1, 7, 30, 31])
def test_logits_of_a_few_tokens_at_a_time_give_the_same_loss_and_gradients(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """With a vocabulary of 100,000 tokens a micro-batch's logits are never in memory as a whole."""
    batch = samples(512, (20, 12), 3)
    assert batch.targets == 30
    reports = []
    for at_once in (1 << 20, tokens):
        monkeypatch.setattr("attention.training.decoder.HEAD_BYTES", at_once * 4 * 512)
        rig = make_rig(checkpoint("mini"))
        assert head_tokens(rig.checkpoint.config) == at_once
        reports.append(rig.step(plans(0, [[batch]]))[0])
    whole, split = reports
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-6)
