"""What the client does about hosts that are slow: frozen ones too."""

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from experts.client import AVOID_S, ExpertClient
from experts.errors import HostSlow, HostUnavailable
from experts.host import ExpertHost
from experts.local import LocalTransport
from experts.messages import ForwardReply, ForwardRequest
from experts.transport import Pending
from model.checkpoint import Checkpoint
from router.gate import Routing, route
from router.placement import Host, Placement
from tests.serving import make_hosts

LAYER = 2
NEVER = 1e9


class Slow(LocalTransport):
    """A transport, and the clock and placement of its client: some lives answer late, by a clock that waits advance."""

    def __init__(self, hosts: Mapping[str, ExpertHost], placement: Placement) -> None:
        self.placement = placement
        self.now_s = 0.0
        self.delays: dict[str, float] = {}
        self.down: set[str] = set()
        self.dies_s: dict[str, float] = {}
        self.asked: list[str] = []
        self.open: set[object] = set()
        self.calls: list[weakref.ref[_Call]] = []
        self.reports: list[tuple[str, str]] = []
        self.replaced_at_s = NEVER
        self.next_lives: Placement | None = None
        super().__init__(hosts)

    def submit(self, host: Host, request: ForwardRequest) -> Pending:
        self.asked.append(host.id)
        call = _Call(self, host, super().submit(host, request), self.now_s)
        self.open.add(call)
        self.calls.append(weakref.ref(call))
        return call

    def snapshot(self) -> Placement:
        if self.now_s >= self.replaced_at_s and self.next_lives is not None:
            self.placement = self.next_lives
        return self.placement

    def names(self, host: Host) -> bool:
        return host in self.snapshot().hosts

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        if self.snapshot().epoch <= epoch:
            self.now_s += timeout_s
        return self.snapshot()

    def report(self, host: Host, reason: str) -> None:
        self.reports.append((host.id, reason))


class _Call:
    def __init__(self, world: Slow, host: Host, inner: Pending, sent_s: float) -> None:
        self._world, self._host, self._inner, self._sent_s = world, host, inner, sent_s

    def result(self, timeout_s: float) -> ForwardReply:
        world = self._world
        ready_s = self._sent_s + world.delays.get(self._host.id, 0.0)
        if self._host.id in world.down or world.now_s >= world.dies_s.get(self._host.id, NEVER):
            self.release()
            raise HostUnavailable(f"{self._host.id} is down")
        if ready_s > world.now_s + timeout_s:
            world.now_s += timeout_s
            raise HostSlow(f"{self._host.id}: no reply in {timeout_s} s")
        world.now_s = max(world.now_s, ready_s)
        return self._inner.result(timeout_s)

    def release(self) -> None:
        self._world.open.discard(self)


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("tiny"))


@pytest.fixture(scope="module")
def routing(opened: Checkpoint) -> Routing:
    return route(torch.randn(9, 16, generator=torch.Generator().manual_seed(4)), opened.config)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(9, 256, generator=torch.Generator().manual_seed(3))


Run = Callable[[], torch.Tensor]


def arrange(
    opened: Checkpoint, rows: torch.Tensor, routing: Routing, count: int, replicas: int
) -> tuple[Slow, ExpertClient, Run, torch.Tensor]:
    """A world, its client, a dispatch in it, and what every dispatch must give."""
    hosts, placement = make_hosts(opened, count, replicas)
    world = Slow(hosts, placement)
    client = ExpertClient(world, world, deadline_s=30.0, hedge_s=0.4, clock=lambda: world.now_s)

    def run() -> torch.Tensor:
        return client.start(LAYER, rows, routing, world.snapshot()).finish()

    return world, client, run, run()


def test_a_frozen_host_is_hedged_and_then_avoided(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    world, client, run, expected = arrange(opened, rows, routing, 3, 2)
    world.delays = {"host-1": NEVER}
    for _ in range(4):
        assert torch.equal(run(), expected)
    assert 0.4 <= world.now_s < 0.5  # one wait for all four
    assert client.stats().hedges == 1
    assert client.stats().rows_resent > 0
    assert not world.open
    assert world.reports[0][0] == "host-1"
    world.delays.clear()
    world.now_s += AVOID_S
    world.asked.clear()
    for _ in range(2):
        run()
    assert "host-1" in world.asked


def test_the_late_reply_is_taken_when_it_is_first(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    world, client, run, expected = arrange(opened, rows, routing, 2, 2)
    world.delays = {"host-0": 0.45, "host-1": 0.45}
    assert torch.equal(run(), expected)
    assert client.stats().hedges == 1
    assert world.now_s == pytest.approx(0.45)
    assert not world.open


def test_without_a_replica_a_late_reply_is_waited_for(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    world, client, run, expected = arrange(opened, rows, routing, 2, 1)
    world.delays = {"host-0": 5.0}
    world.asked.clear()
    assert torch.equal(run(), expected)
    assert sorted(world.asked) == ["host-0", "host-1"]
    assert client.stats().hedges == client.stats().resends == 0
    assert not world.open


@pytest.mark.usefixtures("uncollected")
def test_a_late_life_that_was_replaced_is_given_up(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    hosts, placement = make_hosts(opened, 2)
    world = Slow(hosts, placement)
    client = ExpertClient(world, world, clock=lambda: world.now_s)
    expected = client.start(LAYER, rows, routing, placement).finish()
    world.delays = {"host-0": NEVER}
    world.replaced_at_s = 1.5
    world.next_lives = placement.with_hosts(
        [Host(host.id, host.generation + (host.id == "host-0"), host.address) for host in placement.hosts]
    )
    dispatch = client.start(LAYER, rows, routing, placement)
    hosts["host-0"].generation += 1
    submit = world.submit

    def second_life(host: Host, request: ForwardRequest) -> Pending:
        world.delays.clear()
        return submit(host, request)

    world.submit = second_life  # type: ignore[method-assign]
    assert torch.equal(dispatch.finish(), expected)
    assert 1.5 <= world.now_s < 1.6
    assert client.stats().resends == 1
    assert not world.open
    del dispatch
    assert not any(call() for call in world.calls)  # each of which keeps what is shared with its host


@pytest.mark.usefixtures("uncollected")
def test_of_a_late_host_that_dies_nothing_is_kept(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    world, client, run, expected = arrange(opened, rows, routing, 2, 2)
    world.delays = {"host-0": NEVER, "host-1": 0.05}
    world.dies_s = {"host-0": 0.42}
    assert torch.equal(run(), expected)
    assert client.stats().hedges == 1
    assert world.now_s == pytest.approx(0.45)
    assert not world.open
    assert not any(call() for call in world.calls)


def test_a_rival_that_fails_leaves_the_late_reply(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    world, client, _, expected = arrange(opened, rows, routing, 2, 2)
    world.delays = {"host-0": 2.0, "host-1": 2.0}
    dispatch = client.start(LAYER, rows, routing, world.placement)
    world.down = {"host-1"}
    assert torch.equal(dispatch.finish(), expected)
    assert client.stats().hedges == 1
    assert world.now_s == pytest.approx(4.0)  # host-0 answered its own part, and then that of host-1
    assert not world.open


def test_slow_work_raises_what_counts_as_late(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    world, client, run, expected = arrange(opened, rows, routing, 2, 2)
    assert client.late_s == 0.4
    world.delays = {"host-0": 0.3, "host-1": 0.3}
    assert torch.equal(run(), expected)
    assert client.late_s == pytest.approx(0.6)  # twice the slowest
    assert client.stats().hedges == 0
