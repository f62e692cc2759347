"""Fewer hosts, or none on a node, with hosts that follow nodes and with those that do not."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import following as following_module
from cluster import room
from cluster.change import ChangeRefused, Phase, Wish
from cluster.controller import Controller
from cluster.following import Following, find_node
from cluster.joining import Joining
from cluster.node_follower import RETRY_S, Desired
from cluster.nodes import Node, parse_nodes
from cluster.spec import ServiceSpec
from cluster.state import ControllerState
from tests.cluster.test_conductor import Service

RESOURCE = "shoal_expert"
HOMES: dict[str, str | None] = {"host-0": "a", "host-1": "b"}


def node(name: str, *others: str) -> Node:
    return Node(name, frozenset((name, f"10.0.0.{name}", *others)), 0.0)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The living nodes, as Ray would tell."""
    living = [node("a"), node("b")]
    monkeypatch.setattr(following_module, "living_nodes", lambda resource: list(living))
    monkeypatch.setattr(room, "living_nodes", lambda resource: list(living))
    return living


@pytest.fixture
def service() -> Service:
    """Two hosts that serve."""
    made = Service(2)
    made.settle()
    return made


class Followed:
    """A service whose hosts follow nodes."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.saved: list[Desired] = []
        self.following = Following(RESOURCE, Desired(), self.saved.append)

    def ask(self, hosts: int | None = None, node: str | None = None) -> dict[str, Any]:
        return room.make_room(self.service.conductor, self.following, self.homes, hosts, node, self.service.now_s)

    @property
    def homes(self) -> dict[str, str | None]:
        return {host: HOMES.get(host) for host in self.service.conductor.committed.members}

    def consider(self) -> bool:
        return self.following.consider(self.service.conductor, self.homes, 4)


@pytest.fixture
def followed(service: Service, nodes: list[Node]) -> Followed:
    made = Followed(service)
    asyncio.run(made.following.look())
    return made


def test_fewer_hosts_are_a_change_of_a_service_that_does_not_follow(service: Service) -> None:
    def ask(hosts: int) -> dict[str, Any]:
        members = service.conductor.committed.members
        homes = {host: HOMES[host] for host in members}
        return room.make_room(service.conductor, None, homes, hosts, None, service.now_s)

    assert ask(2) == {"done": True, "change": None}
    begun = ask(1)
    assert not begun["done"]
    assert begun["change"]["leaving"] == ["host-1"]
    assert ask(1)["change"]["id"] == begun["change"]["id"]
    service.settle()
    assert ask(1) == {"done": True, "change": None}


def test_a_node_is_drained_after_what_is_under_way(service: Service, nodes: list[Node]) -> None:
    other = service.begin(Wish("replicas", replicas=2))

    def ask(name: str) -> dict[str, Any]:
        homes = {host: HOMES[host] for host in service.conductor.committed.members}
        return room.make_room(service.conductor, None, homes, None, name, service.now_s)

    assert ask("10.0.0.b")["change"]["id"] == other.id
    service.settle()
    with pytest.raises(ChangeRefused, match="2 replicas of each expert on 1 hosts"):
        ask("10.0.0.b")
    service.begin(Wish("replicas", replicas=1))
    service.settle()
    assert ask("10.0.0.b")["change"]["leaving"] == ["host-1"]
    service.settle()
    assert ask("10.0.0.b") == {"done": True, "change": None}
    with pytest.raises(ChangeRefused, match="0 expert hosts"):
        ask("10.0.0.a")


def test_a_service_that_is_not_ready_yet_is_asked_again() -> None:
    service = Service(2)

    def ask() -> dict[str, Any]:
        return room.make_room(service.conductor, None, HOMES, 1, None, service.now_s)

    assert ask() == {"done": False, "change": None}
    service.settle()
    assert ask()["change"]["leaving"] == ["host-1"]


@pytest.mark.parametrize("call", ["begin_change", "make_room"])
def test_a_controller_without_its_hosts_says_whether_to_ask_again(call: str, service: Service) -> None:
    controller = object.__new__(Controller)
    controller._conductor, controller._stopping, controller._reason = None, False, None
    controller._state = ControllerState("token", core=service.saved)  # it was restarted

    def refusal() -> ChangeRefused:
        asked = controller.begin_change({"kind": "scale"}) if call == "begin_change" else controller.make_room(1, None)
        with pytest.raises(ChangeRefused) as refused:
            asyncio.run(asked)
        return refused.value

    assert refusal().busy
    controller._reason = "the checkpoint has no config.json"
    assert not refusal().busy
    assert "cannot start: the checkpoint has no config.json" in str(refusal())


@pytest.mark.parametrize("call", ["begin_change", "make_room"])
def test_the_id_of_a_change_that_was_told_is_no_others_after_a_restart(
    call: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the controller dies before it does anything for the change."""
    kept: list[ControllerState] = []
    monkeypatch.setattr("cluster.controller_body.save_state", lambda name, state: kept.append(state))
    controller = object.__new__(Controller)
    controller._conductor, controller._stopping, controller._following = service.conductor, False, None
    controller._spec, controller._joining = ServiceSpec("s", "m"), Joining(ServiceSpec("s", "m"), None)
    controller._pool, controller._fleet = None, SimpleNamespace(homes=lambda: HOMES)  # type: ignore[assignment]
    controller._state, controller._changed = ControllerState("token", core=service.saved), asyncio.Event()
    if call == "begin_change":
        told = asyncio.run(controller.begin_change({"kind": "scale", "hosts": 3}))
    else:
        told = asyncio.run(controller.make_room(1, None))["change"]
    assert controller._changed.is_set()
    later = Service(2, kept[-1].core)
    later.settle()
    assert later.conductor.request(Wish("replicas", replicas=2), later.now_s).id != told["id"]


def test_what_is_desired_is_saved_and_then_done(followed: Followed) -> None:
    assert followed.ask(hosts=1) == {"done": False, "change": None}
    assert followed.saved == [Desired(at_most=1)]
    assert followed.consider()
    assert not followed.consider()
    assert followed.ask(hosts=1)["change"]["leaving"] == ["host-1"]
    followed.service.settle()
    assert followed.ask(hosts=1) == {"done": True, "change": None}
    assert followed.following.describe() == {
        "resource": RESOURCE,
        "nodes": 2,
        "wanted": 1,
        "at_most": 1,
        "emptied": [],
    }


def test_a_node_is_emptied_unless_it_is_the_last(followed: Followed, nodes: list[Node]) -> None:
    assert not followed.ask(node="10.0.0.a")["done"]
    assert followed.consider()
    followed.service.settle()
    assert followed.service.conductor.committed.members == ("host-1",)
    assert followed.ask(node="a") == {"done": True, "change": None}
    with pytest.raises(ChangeRefused, match="node b is the last one"):
        followed.ask(node="b")
    assert [each.id for each in followed.following.usable()] == ["b"]
    del nodes[0]
    asyncio.run(followed.following.look())
    assert followed.saved[-1] == Desired()


def test_fewer_hosts_than_replicas_are_refused(followed: Followed) -> None:
    followed.service.begin(Wish("replicas", replicas=2))
    followed.service.settle()
    with pytest.raises(ChangeRefused, match="1 hosts cannot hold 2 replicas"):
        followed.ask(hosts=1)
    assert followed.saved == []


def test_an_undone_change_is_begun_again_after_a_rest(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(following_module.time, "monotonic", lambda: now[0])
    followed.ask(hosts=1)
    assert followed.consider()
    change = followed.service.conductor.change
    assert change is not None
    followed.service.act()
    followed.service.died("host-0", 1)
    followed.service.act()
    assert change.phase is Phase.ROLLED_BACK
    followed.service.settle()
    assert not followed.consider()
    now[0] += RETRY_S
    assert followed.consider()


def test_a_service_waits_for_its_first_nodes(
    followed: Followed, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []

    async def sleep(seconds: float) -> None:
        nodes.append(node(f"late-{len(nodes)}"))

    monkeypatch.setattr(following_module.asyncio, "sleep", sleep)
    assert asyncio.run(followed.following.first_hosts(4, 9, told.append)) == 4
    assert told[0] == "waiting for 4 nodes with the resource shoal_expert; there are 2"
    assert told[2:] == [None]
    assert asyncio.run(followed.following.first_hosts(2, 9, told.append)) == 4  # as many as there are
    assert asyncio.run(followed.following.first_hosts(2, 3, told.append)) == 3  # a model has so many experts


def test_a_node_is_known_by_each_of_its_names_and_by_one_node_only() -> None:
    here = [node("a", "gpu-1"), node("b", "gpu-1")]
    assert find_node("10.0.0.b", here) == "b"
    with pytest.raises(ChangeRefused, match=r"several nodes are called 'gpu-1'"):
        find_node("gpu-1", here)
    with pytest.raises(ChangeRefused, match=r"no node for expert hosts called 'c'.*there are: gpu-1"):
        find_node("c", here)


def test_nodes_are_those_that_live_and_have_the_resource() -> None:
    base = {"NodeManagerAddress": "10.0.0.7", "NodeManagerHostname": "h", "NodeName": ""}
    described = [
        base | {"NodeID": "a", "Alive": True, "Resources": {RESOURCE: 1.0, "CPU": 4.0}},
        base | {"NodeID": "b", "Alive": False, "Resources": {RESOURCE: 1.0}},
        base | {"NodeID": "c", "Alive": True, "Resources": {"CPU": 2.0}},
    ]
    assert parse_nodes(described, RESOURCE) == [Node("a", frozenset({"a", "10.0.0.7", "h"}), 4.0)]
    assert [each.id for each in parse_nodes(described, None)] == ["a", "c"]
