"""What the controller decides is a function of what it sees."""

import pytest

from cluster.policy import (
    MAX_BACKOFF_S,
    START_ATTEMPTS,
    GiveUp,
    HostView,
    Restart,
    backoff_s,
    decide,
    table,
)
from router.placement import Owners

OWNERS: dict[int, Owners] = {1: ((0, 1), (1, 2), (2, 0))}  # each expert at two of three hosts


def view(index: int, state: str = "ready", **fields: float) -> HostView:
    return HostView(f"host-{index}", 4, state, f"127.0.0.1:{index}", **fields)  # type: ignore[arg-type]


def test_only_the_dead_are_restarted_and_as_a_later_life() -> None:
    hosts = [view(0), view(1, "loading"), view(2, "dead", quick_deaths=1)]
    assert decide(hosts, ever_ready=True, now_s=100.0) == [Restart("host-2", 5)]


def test_a_host_that_keeps_dying_waits_longer_and_longer() -> None:
    waits = [backoff_s(deaths) for deaths in range(12)]
    assert waits[:2] == [0.0, 0.0]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_BACKOFF_S
    dead = view(0, "dead", died_at_s=50.0, quick_deaths=4)
    due = 50.0 + backoff_s(4)
    assert decide([dead], ever_ready=True, now_s=due - 0.01) == []
    assert decide([dead], ever_ready=True, now_s=due) == [Restart("host-0", 5)]


def test_a_service_that_never_came_up_is_given_up_and_one_that_did_is_not() -> None:
    dead = view(1, "dead", quick_deaths=START_ATTEMPTS)
    (decision,) = decide([view(0), dead], ever_ready=False, now_s=1e6)
    assert isinstance(decision, GiveUp)
    assert "host-1 died 3 times" in decision.reason
    assert decide([view(0), dead], ever_ready=True, now_s=1e6) == [Restart("host-1", 5)]


def test_the_table_names_only_hosts_that_are_ready() -> None:
    placement = table(OWNERS, [view(0), view(1, "dead"), view(2)], epoch=9)
    assert placement is not None
    assert placement.epoch == 9
    assert placement.owners[1] == ((0,), (2,), (2, 0))
    assert [host.generation for host in placement.hosts] == [4, 4, 4]


@pytest.mark.parametrize("state", ["loading", "dead"])
def test_there_is_no_table_while_an_expert_has_no_holder(state: str) -> None:
    assert table(OWNERS, [view(0, state), view(1, state), view(2)], epoch=1) is None
