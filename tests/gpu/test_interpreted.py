"""A whole model through the GPU's kernels in Triton's interpreter: they are given what they take, and answer right."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention.engine import EngineLimits
from attention.scheduler import SchedulerLimits
from experts.local import LocalTransport
from experts.near import NearFlight
from kernels.experts import PackedExperts
from kernels.native import CHOICE, native
from tests.oracle import greedy_tokens
from tests.serving import greedy, make_engine, run

pytestmark = pytest.mark.usefixtures("interpreted")
LIMITS = EngineLimits(cache_blocks=32, max_length=128, scheduler=SchedulerLimits(step_tokens=12))


@pytest.mark.parametrize(("hosts", "near"), [(1, True), (2, True), (2, False)])
def test_tokens_are_transformers_and_log_probabilities_those_of_the_cpus_kernels(
    checkpoint: Callable[[str], Path], hosts: int, near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rng = checkpoint("least"), random.Random(9)
    prompts = [[rng.randrange(2, 272) for _ in range(length)] for length in (1, 14, 5)]
    asked = [greedy(str(number), prompt, 3, logprobs=2) for number, prompt in enumerate(prompts)]
    landed: list[int] = []
    land = NearFlight.land
    monkeypatch.setattr(NearFlight, "land", lambda self, *given: landed.append(self.rows) or land(self, *given))
    if not near:
        monkeypatch.setattr(LocalTransport, "lanes", lambda self, names: None)
    here = run(make_engine(path, hosts, LIMITS), asked)
    assert bool(landed) == near
    monkeypatch.delenv(CHOICE)
    native.cache_clear()
    there = run(make_engine(path, hosts, LIMITS), asked)
    for number, prompt in enumerate(prompts):
        answer, expected = here[str(number)], there[str(number)]
        assert answer.tokens == expected.tokens == greedy_tokens(path, prompt, 3)
        for ours, theirs in zip(answer.logprobs, expected.logprobs, strict=True):
            assert abs(ours.logprob - theirs.logprob) < 1e-4


@pytest.mark.parametrize("held", [(0,), (0, 2), (3,)])
def test_slots_of_experts_that_are_not_held_stay_as_they_are(held: tuple[int, ...]) -> None:
    store = PackedExperts(hidden_size=16, intermediate_size=8)
    generator = torch.Generator().manual_seed(1)
    for expert in held:
        store.load(expert, *(torch.randn(shape, generator=generator) for shape in ((8, 16), (8, 16), (16, 8))))
    expert_TK = torch.tensor([[0, 1], [2, 3], [3, 0]])
    out = torch.full((6, 16), 7.0)
    store.compute_slots(torch.randn(3, 16, generator=generator), expert_TK, out)
    for slot, expert in enumerate(expert_TK.view(-1).tolist()):
        assert bool((out[slot] == 7).all()) == (expert not in held)
