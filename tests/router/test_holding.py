"""Who is meant to hold what, and the table that is made of it."""

import json

import pytest

from router.holding import Holding
from router.placement import Host

HOLDING = Holding({1: (("a",), ("b", "a"), ("b",)), 3: (("a",), ("a",), ("b",))})
A, B = Host("a", 2, "here"), Host("b", 7, "there")
ALL = {"a": HOLDING.held_by("a"), "b": HOLDING.held_by("b")}


def test_a_host_holds_what_names_it() -> None:
    assert HOLDING.held_by("a") == {(1, 0), (1, 1), (3, 0), (3, 1)}
    assert HOLDING.held_by("b") == {(1, 1), (1, 2), (3, 2)}
    assert HOLDING.held_by("c") == frozenset()


@pytest.mark.parametrize("holders", [((),), (("a", "a"),)])
def test_every_expert_has_distinct_holders(holders: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(ValueError, match="layer 1 expert 0 has holders"):
        Holding({1: holders})


def test_it_crosses_json() -> None:
    assert Holding.from_json_dict(json.loads(json.dumps(HOLDING.to_json_dict()))) == HOLDING


def test_indexes_become_ids() -> None:
    assert Holding.from_owners({1: ((0,), (1, 0), (1,)), 3: ((0,), (0,), (1,))}, ("a", "b")) == HOLDING


def test_the_table_keeps_the_order_of_preference() -> None:
    table = HOLDING.table(5, (A, B), ALL)
    assert table is not None
    assert (table.epoch, table.hosts) == (5, (A, B))
    assert table.owners == {1: ((0,), (1, 0), (1,)), 3: ((0,), (0,), (1,))}


def test_the_table_names_only_what_is_really_held() -> None:
    table = HOLDING.table(5, (A, B), ALL | {"b": ALL["b"] - {(1, 1)}})
    assert table is not None
    assert table.owners[1] == ((0,), (0,), (1,))


def test_what_is_held_beyond_the_plan_is_not_asked_for() -> None:
    assert HOLDING.table(5, (A, B), ALL | {"b": ALL["b"] | {(1, 0)}}) == HOLDING.table(5, (A, B), ALL)


def test_there_is_no_table_while_an_expert_has_no_holder() -> None:
    assert HOLDING.table(5, (A,), ALL) is None
    assert HOLDING.table(5, (A, B), ALL | {"a": ALL["a"] - {(3, 0)}}) is None
