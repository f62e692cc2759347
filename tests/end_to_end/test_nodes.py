"""Expert hosts follow Ray's nodes: they come, are announced to go, or are lost, and no stream notices."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.clients import wait_until
from tests.end_to_end.deployment import EXPERT_NODE, Deployment
from tests.end_to_end.prompts import mixed_bodies
from tests.end_to_end.ray_nodes import RayNode
from tests.end_to_end.streams import Body, run_streams

pytestmark = pytest.mark.ray

STREAMS = 16
TOKENS = 64


@pytest.fixture(scope="module")
def service(checkpoint: Callable[[str], Path]) -> Iterator[Deployment]:
    experts = {"hosts": 2, "threads": 1, "node_resource": EXPERT_NODE}
    with Deployment(checkpoint("tiny"), expert_nodes=2, experts=experts, attention={"threads": 1}) as running:
        yield running


@pytest.fixture(scope="module")
def bodies(checkpoint: Callable[[str], Path]) -> list[Body]:
    return mixed_bodies(checkpoint("tiny").name, STREAMS, TOKENS)


def homes(service: Deployment) -> list[str]:
    """The nodes of the hosts that serve, if all do."""
    report = service.status()
    ready = report["state"] == "ready" and report["change"] is None
    return sorted(host["node"] for host in report["expert_hosts"]) if ready else []


def settle(service: Deployment, nodes: list[RayNode]) -> None:
    """Until each of these nodes has its host, and no other node has one."""
    wait_until(lambda: homes(service) == sorted(str(node.id) for node in nodes))


def make_room(service: Deployment, **wish: Any) -> None:
    deadline_s = time.monotonic() + 60
    while not service.begin("room", **wish).json()["done"]:
        assert time.monotonic() < deadline_s, service.status()
        time.sleep(0.2)


def test_hosts_follow_nodes_under_load(service: Deployment, bodies: list[Body]) -> None:
    streams, _ = run_streams(service.url, bodies)
    assert [stream.error for stream in streams] == [None] * STREAMS
    expected = [stream.answer for stream in streams]
    nodes = service.expert_nodes
    settle(service, nodes)

    def harmed(harm: Callable[[], object]) -> None:
        streams, _ = run_streams(service.url, bodies, harm)
        assert [stream.answer for stream in streams] == expected

    def join() -> None:
        nodes.extend(service.add_expert_node() for _ in range(2))
        settle(service, nodes)

    def announce_and_go() -> None:
        make_room(service, hosts=3)
        assert service.status()["nodes"] == {
            "resource": EXPERT_NODE,
            "nodes": 4,
            "wanted": 3,
            "at_most": 3,
            "emptied": [],
        }
        leaving = nodes.pop(0)  # not the one that was emptied: its host moves there
        make_room(service, node=leaving.address)
        leaving.kill()
        settle(service, nodes)
        assert service.status()["nodes"]["at_most"] is None

    def lose() -> None:
        nodes.pop().kill()
        wait_until(lambda: len(homes(service)) == 3)
        nodes.append(service.add_expert_node())
        settle(service, nodes)

    for harm in (join, announce_and_go, lose):
        harmed(harm)


def test_a_standby_waits_on_each_node_and_the_dead_come_back_where_they_were(service: Deployment) -> None:
    wait_until(lambda: len(service.status()["standby"]) == len(service.expert_nodes))
    before = service.hosts()
    service.kill_host(1)
    wait_until(lambda: service.hosts()[1]["generation"] > before[1]["generation"] and homes(service))
    assert [host["node"] for host in service.hosts()] == [host["node"] for host in before]


def test_the_last_node_is_not_emptied(service: Deployment) -> None:
    for node in service.expert_nodes[1:]:
        make_room(service, node=node.address)
    refused = service.begin("room", node=service.expert_nodes[0].address)
    assert (refused.status_code, "is the last one" in refused.text) == (400, True)
    assert homes(service) == [service.expert_nodes[0].id]
