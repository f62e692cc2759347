"""Expert hosts on Ray nodes of their own: where they come back, and what is refused."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.clients import wait_until
from tests.end_to_end.deployment import EXPERT_NODE, Deployment
from tests.end_to_end.ray_nodes import node_id

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def service(checkpoint: Callable[[str], Path]) -> Iterator[Deployment]:
    experts = {"hosts": 2, "threads": 1, "node_resource": EXPERT_NODE}
    with Deployment(checkpoint("tiny"), expert_nodes=2, experts=experts, attention={"threads": 1}) as running:
        yield running


def homes(service: Deployment) -> list[str]:
    """The nodes of the hosts that serve, if all do and nothing is under way."""
    report = service.status()
    ready = report["state"] == "ready" and report["change"] is None
    return [host["node"] for host in report["expert_hosts"]] if ready else []


def make_room(service: Deployment, **wish: Any) -> None:
    deadline_s = time.monotonic() + 60
    while not service.begin("room", **wish).json()["done"]:
        assert time.monotonic() < deadline_s, service.status()
        time.sleep(0.2)


def test_a_standby_waits_on_each_node_and_the_dead_come_back_where_they_were(service: Deployment) -> None:
    wait_until(lambda: len(service.status()["standby"]) == 2)
    before = service.hosts()
    assert {host["node"] for host in before} == {node_id(node) for node in service.expert_nodes}
    for index in range(2):
        service.kill_host(index)
        wait_until(lambda index=index: service.hosts()[index]["generation"] > 1 and len(homes(service)) == 2)
    assert homes(service) == [host["node"] for host in before]


def test_what_was_asked_for_outlives_the_controller(service: Deployment) -> None:
    make_room(service, hosts=1)
    controller = service.status()["controller"]["pid"]
    service.kill_controller()
    wait_until(lambda: service.get("status").status_code == 200 and service.status()["controller"]["pid"] != controller)
    wait_until(lambda: len(homes(service)) == 1)
    assert service.status()["nodes"] == {
        "resource": EXPERT_NODE,
        "nodes": 2,
        "wanted": 1,
        "at_most": 1,
        "emptied": [],
    }
    make_room(service, hosts=2)
    wait_until(lambda: len(homes(service)) == 2)


def test_a_node_is_emptied_and_the_last_is_not(service: Deployment) -> None:
    first, second = service.expert_nodes
    make_room(service, node=first.address)
    assert homes(service) == [node_id(second)]
    refused = service.begin("room", node=second.address)
    assert (refused.status_code, "is the last one" in refused.text) == (400, True)


def test_hosts_that_follow_nodes_are_not_counted_by_hand(service: Deployment) -> None:
    for route, wish in (("scale", {"hosts": 2}), ("drain", {"host": "host-0"})):
        refused = service.begin(route, **wish)
        assert (refused.status_code, "follow the nodes" in refused.text) == (400, True)
