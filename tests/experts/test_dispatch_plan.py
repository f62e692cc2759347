"""Holders of an expert are asked equally often, whatever others of its layer there are."""

from collections import Counter

import pytest

from experts.dispatch_plan import NOBODY, OwnerTables
from router.placement import Host, Placement

HOSTS = tuple(Host(f"host-{index}", 1, f"127.0.0.1:{index}") for index in range(4))
LAYERS = (0, 1, 2)


def tables(*holders: tuple[int, ...]) -> OwnerTables:
    return OwnerTables(Placement(1, HOSTS, dict.fromkeys(LAYERS, holders)))


@pytest.mark.parametrize(
    "holders",
    [((0,), (1, 2)), ((0, 1), (1, 2, 3)), ((0, 1), (0, 1, 2), (0, 1, 2, 3))],
    ids=["1 and 2", "2 and 3", "2, 3 and 4"],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_holders_take_turns_equally(holders: tuple[tuple[int, ...], ...], layer: int) -> None:
    plan = tables(*holders)
    asked = [plan.owners(layer, turn).tolist() for turn in range(120)]
    for expert, able in enumerate(holders):
        assert Counter(owners[expert] for owners in asked) == {host: 120 // len(able) for host in able}


def test_who_failed_is_not_asked_and_who_is_avoided_only_alone() -> None:
    plan = tables((0, 1), (1,), (2,))
    for turn in range(4):
        assert plan.owners(0, turn, failed=[HOSTS[2]], avoided=[HOSTS[1]]).tolist() == [0, 1, NOBODY]


def test_sharers_are_those_who_may_be_asked() -> None:
    plan = tables((0, 1, 2), (3,), (1, 3))
    whole = plan.sharers(0)
    assert whole is not None
    assert whole.holder_EC.tolist() == [[0, 1, 2], [3, NOBODY, NOBODY], [1, 3, NOBODY]]
    assert whole.holders_E.tolist() == [3, 1, 2]
    less = plan.sharers(0, failed=[HOSTS[3]], avoided=[HOSTS[0]])
    assert less is not None
    assert (less.holder_EC.tolist(), less.holders_E.tolist()) == ([[1, 2], [NOBODY, NOBODY], [1, NOBODY]], [2, 0, 1])
    assert plan.sharers(0, failed=HOSTS[1:]) is None
    assert tables((0,), (1,)).sharers(0) is None
