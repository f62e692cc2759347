"""Requests of one layer are computed together, each answered as if it were alone; what fails, fails alone."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from experts.errors import HostRefused
from experts.host import ExpertHost
from experts.host_loop import HostLoop
from experts.messages import ForwardReply, ForwardRequest
from kernels.experts import PackedExperts
from model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def host(checkpoint: Callable[[str], Path]) -> ExpertHost:
    opened = Checkpoint.open(checkpoint("tiny"))
    made = ExpertHost(opened.config, "host-0", 1)
    made.load(opened, [(layer, expert) for layer in (1, 2) for expert in range(16)])
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each grouped call."""
    rows: list[int] = []
    original = PackedExperts.__call__

    def counted(self: PackedExperts, x_RD: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        rows.append(len(x_RD))
        return original(self, x_RD, *given)

    monkeypatch.setattr(PackedExperts, "__call__", counted)
    return rows


def request(rows: int = 3, seed: int = 0, layer: int = 1, generation: int = 1, first: int = 0) -> ForwardRequest:
    x_RD = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))
    experts = (torch.arange(rows) + first) % 16
    return ForwardRequest(1, generation, layer, x_RD, torch.arange(rows).int(), experts.int())


def test_one_call_a_layer_and_the_bits_of_being_alone(host: ExpertHost, calls: list[int]) -> None:
    asked = [request(3, 1), request(5, 2, layer=2), request(7, 3, first=4), request(1, 4)]
    alone = [host.forward(each).y_PD for each in asked]
    calls.clear()
    answers = host.forward_batch(asked)
    assert sorted(calls) == [5, 11]
    for answer, expected in zip(answers, alone, strict=True):
        assert isinstance(answer, ForwardReply)
        assert torch.equal(answer.y_PD, expected)


def test_results_are_where_they_were_wanted(host: ExpertHost) -> None:
    asked = [request(3, 1), request(5, 2)]
    for batch in (asked, asked[:1]):
        outs = [torch.zeros(len(each.x_RD), 256) for each in batch]
        for answer, out, each in zip(host.forward_batch(batch, outs), outs, batch, strict=True):
            assert isinstance(answer, ForwardReply)
            assert answer.y_PD.data_ptr() == out.data_ptr()
            assert torch.equal(out, host.forward(each).y_PD)


def test_a_bad_request_is_refused_alone(host: ExpertHost) -> None:
    bad = ForwardRequest(1, 1, 1, torch.zeros(1, 256), torch.tensor([4]).int(), torch.tensor([0]).int())
    wide = ForwardRequest(1, 1, 1, torch.zeros(1, 8), torch.zeros(1).int(), torch.zeros(1).int())
    asked = [bad, request(3, 1), request(generation=9), wide, request(layer=77), request(2, 5)]
    answers = host.forward_batch(asked)
    codes = [answer.code if isinstance(answer, HostRefused) else "" for answer in answers]
    assert codes == ["bad_request", "", "wrong_generation", "bad_request", "not_held", ""]
    for index in (1, 5):
        answer = answers[index]
        assert isinstance(answer, ForwardReply)
        assert torch.equal(answer.y_PD, host.forward(asked[index]).y_PD)


class Slow(ExpertHost):
    """Counts batches, and waits to be let go."""

    def __init__(self, like: ExpertHost) -> None:
        self.__dict__.update(like.__dict__)
        self.batches: list[int] = []
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.broken: Exception | None = None

    def forward_batch(
        self, requests: Sequence[ForwardRequest], outs: Sequence[torch.Tensor | None] | None = None
    ) -> list[ForwardReply | HostRefused]:
        self.batches.append(len(requests))
        self.entered.set()
        assert self.let_go.wait(20)
        if self.broken is not None:
            raise self.broken
        return super().forward_batch(requests, outs)


def test_what_waits_together_is_answered_together(host: ExpertHost) -> None:
    slow = Slow(host)
    loop = HostLoop(slow)
    loop.start()
    first = loop.submit(request())
    assert slow.entered.wait(10)
    others = [loop.submit(request(2 + seed, seed)) for seed in range(5)]
    slow.let_go.set()
    for seed, future in enumerate(others):
        answer = future.result(10)
        assert isinstance(answer, ForwardReply)
        assert torch.equal(answer.y_PD, host.forward(request(2 + seed, seed)).y_PD)
    assert isinstance(first.result(10), ForwardReply)
    assert slow.batches == [1, 5]
    assert loop.close(10)


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("the device"), ImportError("a compiler")])
def test_a_failure_is_told_and_the_next_request_computed(host: ExpertHost, error: Exception) -> None:
    slow = Slow(host)
    slow.let_go.set()
    loop = HostLoop(slow)
    loop.start()
    slow.broken = error
    refusal = loop.submit(request()).result(10)
    assert isinstance(refusal, HostRefused)
    assert (refusal.code, refusal.may_pass) == ("failed", True)
    slow.broken = None
    assert isinstance(loop.submit(request()).result(10), ForwardReply)
    assert loop.close(10)


def test_the_system_knows_which_host_a_thread_computes_for(host: ExpertHost) -> None:
    loop = HostLoop(host)
    loop.start()
    loop.submit(request()).result(10)
    assert "expert-host-0\n" in [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    assert loop.close(10)


def test_after_the_end_a_request_is_refused(host: ExpertHost) -> None:
    loop = HostLoop(host)
    loop.start()
    assert loop.close(10)
    refusal = loop.submit(request()).result(10)
    assert isinstance(refusal, HostRefused)
    assert refusal.code == "failed"


def test_a_request_that_comes_while_the_loop_ends_is_refused(host: ExpertHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last look for requests, and before its thread is seen to have ended."""
    loop = HostLoop(host)
    looked, let_go = threading.Event(), threading.Event()
    refuse_all = loop._refuse_all

    def linger(reason: str) -> None:
        refuse_all(reason)
        if threading.current_thread() is loop._thread:
            looked.set()
            assert let_go.wait(10)

    monkeypatch.setattr(loop, "_refuse_all", linger)
    loop.start()
    assert not loop.close(0.0)
    assert looked.wait(10)
    try:
        assert isinstance(loop.submit(request()).result(5), HostRefused)
    finally:
        let_go.set()
    assert loop.close(10)
