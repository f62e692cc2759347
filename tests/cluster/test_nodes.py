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


@pytest.mark.parametrize(
    ("here", "hosts", "threads"),
    [
        ("elsewhere", 2, 8),  # the smaller of them decides
        ("elsewhere", 4, 4),
        ("head", 2, 8),  # where none of them lives
        ("a", 2, 6),  # where Ray was told of more than there is
        ("b", 4, 3),
        ("b", 5, 2),
    ],
)
def test_hosts_share_the_cores_of_the_nodes_that_they_may_be_on(
    monkeypatch: pytest.MonkeyPatch, here: str, hosts: int, threads: int
) -> None:
    monkeypatch.setattr("cluster.nodes.gethostname", lambda: here)
    monkeypatch.setattr("cluster.nodes.node_threads", lambda: 6)
    assert shared_threads(hosts, [node("head", 0), node("a", 16), node("b", 8)]) == threads


def test_nodes_on_one_machine_have_no_more_than_it_has_whatever_ray_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.nodes.gethostname", lambda: "machine")
    monkeypatch.setattr("cluster.nodes.node_threads", lambda: 2)
    nodes = [Node(name, frozenset({name, "machine"}), 64) for name in "abc"]
    assert [shared_threads(hosts, nodes) for hosts in (1, 3, 4, 12)] == [2, 2, 1, 1]


@pytest.mark.parametrize("cpus", [0, 0.5])
def test_where_ray_counts_no_cores_there_are_as_many_as_here(monkeypatch: pytest.MonkeyPatch, cpus: float) -> None:
    monkeypatch.setattr("cluster.nodes.node_threads", lambda: 6)
    assert shared_threads(4, [node("expert", cpus)]) == 1
    assert shared_threads(2, [node("expert", cpus)]) == 3
    assert shared_threads(2, []) == 3


def test_nodes_that_were_given_no_cores_are_left_alone_while_others_have_some() -> None:
    nodes = [node("head", 0), node("attention", 2)]
    assert least_crowded(nodes, {"attention": 7}) == "attention"
    assert least_crowded(nodes[:1], {"head": 7}) == "head"
    assert [list(with_cores(some)) for some in (nodes, nodes[:1])] == [nodes[1:], nodes[:1]]
    assert least_crowded([], {}) is None
