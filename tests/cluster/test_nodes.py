"""On which node the next expert actor goes."""

import pytest

from cluster.nodes import Node, least_crowded, shared_threads, with_cores


def node(name: str, cpus: float) -> Node:
    return Node(name, frozenset({name}), cpus)


def test_the_node_with_the_fewest_actors_for_its_cores() -> None:
    nodes = [node("large", 8), node("small", 2)]
    chosen: list[str | None] = []
    for _ in range(5):
        chosen.append(least_crowded(nodes, {name: chosen.count(name) for name in ("large", "small")}))
    assert (chosen.count("large"), chosen.count("small")) == (4, 1)


def test_hosts_share_the_cores_of_the_nodes_that_they_may_be_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.nodes.node_threads", lambda: 6)
    nodes = [node("head", 0), node("a", 16), node("b", 8)]
    assert shared_threads(4, nodes) == 3
    assert shared_threads(4, nodes[:1]) == 1
    assert shared_threads(2, nodes[:1]) == 3


def test_nodes_that_were_given_no_cores_are_left_alone_while_others_have_some() -> None:
    nodes = [node("head", 0), node("attention", 2)]
    assert least_crowded(nodes, {"attention": 7}) == "attention"
    assert least_crowded(nodes[:1], {"head": 7}) == "head"
    assert [list(with_cores(some)) for some in (nodes, nodes[:1])] == [nodes[1:], nodes[:1]]
    assert least_crowded([], {}) is None
