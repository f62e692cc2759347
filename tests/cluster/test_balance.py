"""A rebalancing begins by itself only where it is worth it, and nothing else goes on."""

from collections.abc import Sequence

import pytest

from cluster.actions import StartHost
from cluster.balance import LOOK_S, REST_S, Balance
from cluster.change import Wish
from cluster.conductor import Conductor
from cluster.events import EventLog
from cluster.plan import ModelShape
from cluster.roster import HostReport
from cluster.saved import Committed
from router.holding import Holding

LAYER, EXPERTS = 1, 8
SHAPE = ModelShape((LAYER,), EXPERTS, groups=1)
EVEN = [1000] * EXPERTS
SKEWED = [4000, 3000, 1000, 1000, 100, 100, 100, 100]  # the first host has nearly all


def serve(balance: Balance, max_pairs: int | None = None) -> Conductor:
    """Two hosts that hold half of the experts each, and serve."""
    ids = ("host-0", "host-1")
    holders = tuple((ids[expert * 2 // EXPERTS],) for expert in range(EXPERTS))
    conductor = Conductor(SHAPE, Committed(Holding({LAYER: holders}), ids, 1, 0), balance.loads, EventLog())
    for action in conductor.act(0.0):
        if isinstance(action, StartHost):
            report = HostReport(action.host_id, action.generation, action.host_id, action.pairs, max_pairs=max_pairs)
            conductor.host_ready(report, 0.0)
    conductor.act(0.0)
    return conductor


def considered(loads: Sequence[int], automatic: bool = True) -> Conductor:
    balance = Balance(SHAPE, automatic)
    conductor = serve(balance)
    balance.add({LAYER: loads}, 1.0)
    balance.consider(conductor, 1.0)
    return conductor


def test_a_skewed_load_is_spread() -> None:
    change = considered(SKEWED).change
    assert change is not None
    assert change.wish == Wish("rebalance")
    assert change.wish.why is not None
    assert "mean imbalance 1.91 to 1.06" in change.wish.why


@pytest.mark.parametrize(
    ("loads", "automatic"), [(SKEWED, False), (EVEN, True), ([load // 1000 for load in SKEWED], True)]
)
def test_it_stays_where_nobody_asked_or_little_is_won_or_known(loads: Sequence[int], automatic: bool) -> None:
    assert considered(loads, automatic).change is None


def test_hosts_without_room_are_left_as_they_are() -> None:
    balance = Balance(SHAPE, automatic=True)
    conductor = serve(balance, max_pairs=EXPERTS // 2 - 1)
    balance.add({LAYER: SKEWED}, 1.0)
    balance.consider(conductor, 1.0)
    assert conductor.change is None


def test_it_rests_after_a_change_and_does_not_look_all_the_time() -> None:
    balance = Balance(SHAPE, automatic=True)
    conductor = serve(balance)
    conductor.request(Wish("rebalance"), 1.0)
    balance.consider(conductor, 1.0)
    for _ in range(3):
        conductor.act(2.0)
    assert conductor.change is None
    balance.add({LAYER: SKEWED}, 2.0)
    balance.consider(conductor, REST_S)
    assert conductor.change is None
    balance.consider(conductor, 1.0 + REST_S)
    assert conductor.change is not None
    quiet = serve(balance)
    balance.consider(quiet, 1.0 + REST_S + LOOK_S / 2)
    assert quiet.change is None


def test_shares_and_imbalance_are_of_the_table_in_use() -> None:
    balance = Balance(SHAPE, automatic=False)
    conductor = serve(balance)
    assert balance.shares(conductor.placement, 0.0) == {}
    assert balance.imbalance(conductor.placement, 0.0) is None
    balance.add({LAYER: [3, 3, 0, 0, 1, 1, 0, 0]}, 0.0)
    assert balance.shares(conductor.placement, 0.0) == {"host-0": 0.75, "host-1": 0.25}
    assert balance.imbalance(conductor.placement, 0.0) == pytest.approx(1.5)
