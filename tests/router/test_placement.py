"""The placement table: every expert held as often as asked, evenly, in versions that never change."""

import json
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig, parse_config
from router.placement import Host, Placement, initial_placement
from tests.model.shapes import V2

HOST_COUNTS = (1, 2, 3, 5, 8)


def config_with(experts: int, layers: int = 4) -> ModelConfig:
    return replace(parse_config(V2), n_routed_experts=experts, num_hidden_layers=layers)


def make_hosts(count: int) -> tuple[Host, ...]:
    return tuple(Host(f"host-{index}", 1, f"127.0.0.1:{9000 + index}") for index in range(count))


def place(experts: int = 16, hosts: int = 4, replicas: int = 1) -> Placement:
    return initial_placement(config_with(experts), make_hosts(hosts), replicas)


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, int, int]:
    """A table, its experts a layer and its replicas."""
    experts = draw(st.sampled_from((16, 64)))
    hosts = draw(st.sampled_from(HOST_COUNTS))
    replicas = draw(st.integers(1, hosts))
    return place(experts, hosts, replicas), experts, replicas


@given(placements())
def test_every_expert_of_every_moe_layer_has_its_replicas_at_distinct_hosts(made: tuple[Placement, int, int]) -> None:
    placement, experts, replicas = made
    assert sorted(placement.owners) == [1, 2, 3]
    for layer in placement.owners:
        assert len(placement.owners[layer]) == experts
        for expert in range(experts):
            holders = placement.holders(layer, expert)
            assert len({host.id for host in holders}) == len(holders) == replicas


@given(placements())
def test_hosts_differ_by_at_most_one_expert_a_layer(made: tuple[Placement, int, int]) -> None:
    placement, _, _ = made
    for layer in placement.owners:
        held = [sum(of == layer for of, _ in placement.held_by(host.id)) for host in placement.hosts]
        assert max(held) - min(held) <= 1


@given(placements())
def test_preferred_holders_differ_by_at_most_one_expert(made: tuple[Placement, int, int]) -> None:
    placement, _, _ = made
    preferred = Counter(holders[0] for holders in placement.owners[1])
    assert len(preferred) == len(placement.hosts)
    assert max(preferred.values()) - min(preferred.values()) <= 1


@given(placements())
def test_held_by_is_the_inverse_of_holders(made: tuple[Placement, int, int]) -> None:
    placement, experts, _ = made
    for host in placement.hosts:
        held = {
            (layer, expert)
            for layer in placement.owners
            for expert in range(experts)
            if host in placement.holders(layer, expert)
        }
        assert set(placement.held_by(host.id)) == held
        assert len(placement.held_by(host.id)) == len(held)


@pytest.mark.parametrize(("hosts", "groups_a_host"), [(1, 4), (2, 2), (4, 1)])
def test_routing_group_stays_together_where_hosts_divide_groups(hosts: int, groups_a_host: int) -> None:
    owners = place(16, hosts).owners[1]
    for host in range(hosts):
        held = [expert for expert in range(16) if owners[expert] == (host,)]
        assert held == list(range(host * 4 * groups_a_host, (host + 1) * 4 * groups_a_host))


def test_worked_example() -> None:
    owners = place(experts=8, hosts=3, replicas=2).owners
    assert owners[1] == ((0, 1), (0, 1), (0, 1), (1, 2), (1, 2), (1, 2), (2, 0), (2, 0))


@given(placements(), st.data())
def test_losing_fewer_hosts_than_replicas_loses_no_expert(
    made: tuple[Placement, int, int], data: st.DataObject
) -> None:
    placement, experts, replicas = made
    ids = [host.id for host in placement.hosts]
    lost = data.draw(st.sets(st.sampled_from(ids), max_size=replicas - 1))
    left = placement.without(sorted(lost))
    assert left is not None
    assert left.epoch == placement.epoch + 1
    assert left.hosts == placement.hosts
    for layer in placement.owners:
        for expert in range(experts):
            kept = [host for host in placement.holders(layer, expert) if host.id not in lost]
            assert list(left.holders(layer, expert)) == kept
    assert all(left.held_by(host_id) == () for host_id in lost)


@given(placements())
def test_losing_every_holder_of_an_expert_is_none(made: tuple[Placement, int, int]) -> None:
    placement, experts, _ = made
    assert placement.without([host.id for host in placement.holders(2, experts - 1)]) is None


def test_restarted_hosts_keep_their_experts_in_the_next_epoch() -> None:
    before = place(replicas=2)
    reborn = tuple(replace(host, generation=host.generation + 1, address="elsewhere") for host in before.hosts)
    after = before.with_hosts(reborn)
    assert after.epoch == before.epoch + 1
    assert after.owners == before.owners
    assert after.holders(1, 0) == (reborn[0], reborn[1])
    assert after.held_by("host-3") == before.held_by("host-3")
    assert before.hosts == make_hosts(4)


def test_epochs_grow_with_every_change() -> None:
    placement = place(replicas=3)
    epochs = [placement.epoch]
    for lost in ([], ["host-1"], ["host-2"]):
        changed = placement.without(lost)
        assert changed is not None
        placement = changed.with_hosts(changed.hosts)
        epochs += [changed.epoch, placement.epoch]
    assert epochs == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 1, 2), (0, 1, 2, 3, 4)])
def test_other_hosts_than_before_are_refused(order: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hosts are \[.*\]; expected \['host-0', 'host-1', 'host-2', 'host-3'\]"):
        place().with_hosts([make_hosts(5)[index] for index in order])


@pytest.mark.parametrize(
    ("hosts", "replicas", "message"),
    [
        (0, 1, "0 expert hosts for 16 experts a layer; use 1 to 16 hosts"),
        (17, 1, "17 expert hosts for 16 experts a layer; use 1 to 16 hosts"),
        (4, 0, "0 replicas of each expert on 4 hosts; use 1 to 4 replicas"),
        (4, 5, "5 replicas of each expert on 4 hosts; use 1 to 4 replicas"),
    ],
)
def test_impossible_counts_are_refused(hosts: int, replicas: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(16, hosts, replicas)


@pytest.mark.parametrize(
    ("epoch", "owners", "message"),
    [
        (0, {1: ((0,),)}, "epoch is 0; expected at least 1"),
        (1, {1: ((0,), ())}, r"layer 1 expert 1 has holders \(\); expected distinct ones"),
        (1, {3: ((1, 1),)}, r"layer 3 expert 0 has holders \(1, 1\); expected distinct ones"),
        (1, {1: ((2,),)}, "layer 1 expert 0: no host 2 of 2"),
        (1, {1: ((-1,),)}, "layer 1 expert 0: no host -1 of 2"),
    ],
)
def test_table_that_cannot_be_followed_is_refused(
    epoch: int, owners: dict[int, tuple[tuple[int, ...], ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(epoch, make_hosts(2), owners)


def test_repeated_host_id_is_refused() -> None:
    with pytest.raises(ValueError, match=r"host ids repeat: \['host-0', 'host-0'\]"):
        Placement(1, (make_hosts(1)[0], replace(make_hosts(1)[0], generation=2)), {1: ((0,),)})


def test_unknown_host_holds_nothing_to_ask_for() -> None:
    with pytest.raises(KeyError, match="host-9"):
        place().held_by("host-9")


@pytest.mark.parametrize("field", ["epoch", "hosts", "owners"])
def test_fields_cannot_be_assigned(field: str) -> None:
    placement = place()
    with pytest.raises(FrozenInstanceError):
        setattr(placement, field, getattr(placement, field))


def test_mapping_it_was_made_from_may_change_without_it() -> None:
    owners = {1: ((0,), (1,))}
    placement = Placement(1, make_hosts(2), owners)
    owners[1] = ((1,), (0,))
    assert placement.holders(1, 0) == (make_hosts(2)[0],)


@given(placements())
def test_json_round_trip_is_the_same_table(made: tuple[Placement, int, int]) -> None:
    placement, experts, _ = made
    again = Placement.from_json(placement.to_json())
    assert again == placement
    assert again.held_by("host-0") == placement.held_by("host-0")
    assert isinstance(again.holders(1, experts - 1)[0], Host)


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": None},
        {"epoch": 0},
        {"epoch": float("inf")},
        {"hosts": [["host-0", 1, "x"]]},
        {"hosts": [{"id": "host-0"}]},
        {"owners": []},
        {"owners": {"1": [[7]]}},
        {"owners": {"1": 3}},
        {"owners": {"one": [[0]]}},
    ],
)
def test_json_of_anything_else_is_refused(change: dict[str, object]) -> None:
    document = json.loads(place().to_json()) | change
    with pytest.raises((ValueError, KeyError, TypeError)):
        Placement.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_text_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Placement.from_json(text)
