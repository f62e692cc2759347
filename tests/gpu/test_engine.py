"""A whole model on a GPU: transformers' tokens, and the same bits in any company, chunks, placement, or graph."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from attention.engine import Engine, EngineLimits
from attention.requests import GenerateRequest
from attention.scheduler import SchedulerLimits
from experts.local import LocalTransport
from model.checkpoint import Checkpoint
from router.placement import Host
from tests.attention.test_narrow_checkpoint import rounded
from tests.oracle import greedy_tokens
from tests.serving import Answer, greedy, make_engine, make_hosts, run

pytestmark = pytest.mark.gpu
ROOM = EngineLimits(cache_blocks=512)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(6)  # with which no two tokens are as likely as makes a difference in fp32
    return [[rng.randrange(2, 512) for _ in range(length)] for length in (1, 33, 290, 70, 9)]


@pytest.fixture(params=["tiny", "tiny-lite", "tiny-yarn"])
def wide(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def path(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return rounded(checkpoint("tiny"), tmp_path / "model", request.param)


def asked(prompts: Sequence[Sequence[int]], tokens: int = 20) -> list[GenerateRequest]:
    requests = [greedy(str(number), prompt, tokens, logprobs=2) for number, prompt in enumerate(prompts)]
    drawn = greedy("drawn", prompts[1], tokens, logprobs=2, temperature=0.8, seed=3, top_p=0.9)
    return [*requests, drawn]


def same(answers: dict[str, Answer], wanted: dict[str, Answer]) -> None:
    for name, answer in answers.items():
        assert answer.error is None
        assert answer.tokens == wanted[name].tokens, name
        assert answer.logprobs == wanted[name].logprobs, name


def test_tokens_are_transformers_and_log_probabilities_the_cpus(wide: Path, prompts: list[list[int]]) -> None:
    requests = asked(prompts)[:-1]
    here = run(make_engine(wide, 2, ROOM, device="cuda"), requests)
    cpu = run(make_engine(wide, 2, ROOM), requests)
    for number, prompt in enumerate(prompts):
        assert here[str(number)].tokens == greedy_tokens(wide, prompt, 20)
        for ours, theirs in zip(here[str(number)].logprobs, cpu[str(number)].logprobs, strict=True):
            assert abs(ours.logprob - theirs.logprob) < 1e-4


def test_bf16_is_near_the_same_numbers_in_fp32(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("tiny-lite")
    narrow, full = rounded(source, tmp_path / "a", torch.bfloat16), rounded(source, tmp_path / "b", torch.float32)
    prompt = [random.Random(6).randrange(2, 512) for _ in range(200)]
    request = greedy("a", prompt, 0, prompt_logprobs=1)
    here = run(make_engine(narrow, 1, ROOM, device="cuda"), [request])["a"].prompt_logprobs[1:]
    cpu = run(make_engine(full, 1, ROOM), [request])["a"].prompt_logprobs[1:]
    errors = [abs(a.logprob - b.logprob) for a, b in zip(here, cpu, strict=True) if a is not None and b is not None]
    assert sum(errors) / len(errors) < 0.02
    assert max(errors) < 0.2


def test_bits_do_not_depend_on_company_or_chunks(path: Path, prompts: list[list[int]]) -> None:
    requests = asked(prompts)
    engine = make_engine(path, 1, ROOM, device="cuda")
    alone: dict[str, Answer] = {}
    for request in requests:
        alone |= run(engine, [request])
    same(run(make_engine(path, 1, ROOM, device="cuda"), requests), alone)
    for step_tokens in (1, 7, 64):
        limits = EngineLimits(cache_blocks=512, scheduler=SchedulerLimits(step_tokens=step_tokens))
        same(run(make_engine(path, 1, limits, device="cuda"), requests), alone)
    small = EngineLimits(cache_blocks=24, max_length=352, scheduler=SchedulerLimits(step_tokens=40))
    engine = make_engine(path, 1, small, device="cuda")
    same(run(engine, requests), alone)
    assert engine.stats().preemptions > 0


class ByHand(LocalTransport):
    """Whose hosts are asked one by one, as those elsewhere are."""

    def lanes(self, hosts: Sequence[Host]) -> None:
        return None


def test_bits_do_not_depend_on_where_the_experts_are(path: Path, prompts: list[list[int]]) -> None:
    requests = asked(prompts)
    wanted = run(make_engine(path, 1, ROOM, device="cuda"), requests)
    for hosts in (2, 3):
        same(run(make_engine(path, hosts, ROOM, device="cuda"), requests), wanted)
        loaded, _ = make_hosts(Checkpoint.open(path), hosts, device="cuda")
        same(run(make_engine(path, hosts, ROOM, ByHand(loaded), device="cuda"), requests), wanted)


def test_a_recorded_step_has_the_bits_of_another(
    path: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked(prompts)
    engine = make_engine(path, 1, ROOM, device="cuda")
    wanted = run(engine, requests)
    assert recorded(engine)
    plain = make_engine(path, 1, ROOM, device="cuda")
    monkeypatch.setattr(plain, "_graphs", None)
    same(run(plain, requests), wanted)


def test_experts_that_move_are_found_where_they_are(path: Path, prompts: list[list[int]]) -> None:
    requests = asked(prompts)
    checkpoint = Checkpoint.open(path)
    hosts, placement = make_hosts(checkpoint, 2, device="cuda")
    engine = make_engine(path, 2, ROOM, LocalTransport(hosts), device="cuda")
    wanted = run(engine, requests)
    assert recorded(engine)
    version = engine._graphs._version if engine._graphs is not None else None
    pairs = sorted(placement.held_by("host-1"))[:3]
    hosts["host-1"].unload(pairs)
    hosts["host-1"].load(checkpoint, pairs)
    same(run(engine, [greedy("again", prompts[2], 20, logprobs=2)]), {"again": wanted["2"]})
    assert engine._graphs is not None
    assert engine._graphs._version != version  # of which graphs are good no more
    assert recorded(engine)


def recorded(engine: Engine) -> int:
    assert engine._graphs is not None
    return len(engine._graphs._steps)
