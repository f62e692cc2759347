"""How long a worker waits for tables of the expert hosts."""

from types import SimpleNamespace

import pytest

from cluster import training_hosts
from cluster.training_hosts import LOOK_S, NEXT_TABLE_S, TrainingHosts
from experts.training.step_hosts import StepLost
from router.placement import Host, Placement

TABLE = Placement(1, (Host("a", 1, ""),), {1: ((0,),)})


class Clock:
    """Of a follower that never hears of a newer table."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def peek(self) -> Placement:
        return TABLE

    def wait_after(self, epoch: int, timeout_s: float) -> None:
        self.now_s += timeout_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(training_hosts, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


@pytest.fixture
def hosts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> TrainingHosts:
    monkeypatch.setattr(TrainingHosts, "_check", lambda _: None)
    hosts = TrainingHosts.__new__(TrainingHosts)
    vars(hosts).update(_follower=clock, _waiting_since_s=None)
    return hosts


def test_hosts_that_stay_away_are_waited_for_and_then_given_up(hosts: TrainingHosts, clock: Clock) -> None:
    assert hosts.newest(wait=False) is TABLE
    for _ in range(int(NEXT_TABLE_S / LOOK_S)):
        assert hosts.newest(wait=True) is TABLE
    clock.now_s += 1
    with pytest.raises(StepLost, match="did not take part for 300 s"):
        hosts.newest(wait=True)


def test_a_wait_that_had_come_to_its_end_does_not_count_for_the_next_one(hosts: TrainingHosts, clock: Clock) -> None:
    hosts.newest(wait=False)
    hosts.newest(wait=True)  # for a lost host, which comes back
    clock.now_s += NEXT_TABLE_S  # and takes its experts from a large snapshot
    hosts.newest(wait=False)
    assert hosts.newest(wait=True) is TABLE  # for another one, which was lost meanwhile
