"""A run is given what there is room for, on each node by itself, so that Ray Train does not try again without end."""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray._private.state
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from rich.console import Console

from cluster import discovery
from cluster.nodes import Node
from cluster.spec import ServiceSpec
from services.training import driver
from services.training.recipe import Recipe, parse_recipe
from services.training.room import NodeRoom, Room, _planned, lacking, look, most_workers
from services.training.trainer import with_threads
from tests.training.small_run import small_run

Amounts = dict[str, float]


def free(*nodes: Amounts, hosts: int = 0) -> Room:
    """Nodes of which nothing is reserved."""
    return Room(tuple(NodeRoom(node, node) for node in nodes), hosts)


def partly(*nodes: tuple[Amounts, Amounts], hosts: int = 0) -> Room:
    """Nodes by what they have and what is free."""
    return Room(tuple(NodeRoom(*node) for node in nodes), hosts)


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, object]:
    return small_run(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("room", "given", "said"),
    [
        (
            free({"CPU": 2}),
            {"workers": {"least": 3}},
            "3 workers with workers.cpus 1 reserve 3 CPUs, of which there are 2: lower one of them",
        ),
        (
            free({"CPU": 2}),
            {"experts": {"cpus": 0.75}},
            "1 workers with workers.cpus 1 and 2 hosts with experts.cpus 0.75 reserve 2.5 CPUs, of which there are 2",
        ),
        (free({"CPU": 2}), {"workers": {"gpus": 1}}, "reserve 1 GPUs, of which there are 0: lower one of them"),
        (
            free({"CPU": 2}),
            {"experts": {"resources": {"big": 1}}},
            "2 hosts with experts.resources.big 1 reserve 2 of big, of which there are 0",
        ),
        (  # a service's hosts have the others
            partly(({"CPU": 4, "GPU": 2}, {"CPU": 4})),
            {"workers": {"gpus": 1}, "experts": {"service": "p8000"}},
            "1 workers with workers.cpus 1, workers.gpus 1 reserve 1 GPUs, of which 0 of 2 are free",
        ),
        (
            free({"CPU": 2}, {"CPU": 2}),
            {"workers": {"cpus": 3}},
            "1 workers with workers.cpus 3: only 0 of the workers fit, each on one node",
        ),
        (
            free({"CPU": 4}, {"CPU": 1}),
            {"experts": {"cpus": 2.0}, "workers": {"least": 1}},
            None,
        ),
        (
            free({"CPU": 3}, {"CPU": 3}),
            {"experts": {"cpus": 2.0}, "workers": {"cpus": 2.0}},
            "only 0 of the workers fit, each on one node",
        ),
        (
            free({"CPU": 3}, {"CPU": 2}),
            {"experts": {"hosts": 3, "cpus": 1.5}, "workers": {"cpus": 0}},
            None,
        ),
        (
            free({"CPU": 3}, {"CPU": 2}),
            {"experts": {"hosts": 2, "cpus": 2.5}, "workers": {"cpus": 0}},
            "1 workers and 2 hosts with experts.cpus 2.5: only 1 of the hosts fit, each on one node",
        ),
        (partly(({"CPU": 4}, {"CPU": 2}), hosts=2), {"experts": {"cpus": 1.0}, "workers": {"least": 2}}, None),
        (free({"CPU": 1}), {"workers": {"least": 10, "cpus": 0.1}}, None),
        (
            free({"CPU": 9, "GPU": 2}),
            {"workers": {"least": 3, "gpus": 0.6}},
            "only 2 of the workers fit, each on one node",
        ),
        (free(), {"workers": {"cpus": 0}}, None),
    ],
)
def test_what_there_is_no_room_for_is_said(
    raw: dict[str, object], room: Room, given: dict[str, object], said: str | None
) -> None:
    lack = lacking(parse_recipe(raw | given), room)
    if said is None:
        assert lack is None
    else:
        assert lack is not None
        assert said in lack


@pytest.mark.parametrize(
    ("room", "given", "most"),
    [
        (free({"CPU": 4}), {"workers": {"most": 8}}, 4),
        (free({"CPU": 4}), {"workers": {"most": 3}}, 3),
        (free({"CPU": 4}), {"workers": {"most": 8}, "experts": {"hosts": 2, "cpus": 1.0}}, 2),
        (free({"CPU": 4}), {"workers": {"most": 8, "cpus": 0.5}, "experts": {"hosts": 2, "cpus": 1.0}}, 4),
        (free({"CPU": 4}), {"workers": {"most": 8}, "experts": {"hosts": 2, "service": "p8000"}}, 4),
        (free({"CPU": 64, "GPU": 4}), {"workers": {"most": 8, "gpus": 1}, "experts": {"hosts": 2, "gpus": 0.5}}, 3),
        (free({"CPU": 4}), {"workers": {"most": 8, "cpus": 0}}, 8),
        # of two GPUs, a service reserves one
        (partly(({"CPU": 4, "GPU": 2}, {"CPU": 4, "GPU": 1})), {"workers": {"most": 2, "gpus": 1}}, 1),
        # each node by itself
        (free({"CPU": 3}, {"CPU": 3}), {"workers": {"most": 8, "cpus": 2}}, 2),
        (free({"CPU": 4}, {"CPU": 4}), {"workers": {"most": 8}, "experts": {"hosts": 2, "cpus": 1.5}}, 4),
        # hosts of an earlier life reserve already
        (partly(({"CPU": 4}, {"CPU": 2}), hosts=2), {"workers": {"most": 8}, "experts": {"cpus": 1.0}}, 2),
        (partly(({"CPU": 4}, {"CPU": 3}), hosts=1), {"workers": {"most": 8}, "experts": {"cpus": 1.0}}, 2),
        # a part of a GPU is all on one
        (free({"CPU": 9, "GPU": 2}), {"workers": {"most": 8, "gpus": 0.6}}, 2),
        # Ray Train would count 9 for itself, and wait
        (free({"CPU": 1}), {"workers": {"least": 9, "most": 12, "cpus": 0.1}}, 10),
        (free({"CPU": 1}), {"workers": {"least": 10, "most": 12, "cpus": 0.1}}, 10),
        (free(*[{"CPU": 1}] * 4), {"workers": {"least": 37, "most": 99, "cpus": 0.1}}, 37),
    ],
)
def test_as_many_workers_as_there_is_room_for(
    raw: dict[str, object], room: Room, given: dict[str, object], most: int
) -> None:
    assert most_workers(parse_recipe(raw | given), room, grows=False) == most


@pytest.mark.parametrize(
    ("room", "given", "most"),
    [
        (free({"CPU": 2}), {"workers": {"most": 8}}, 8),  # whatever joins is counted rightly
        (free(), {"workers": {"least": 2, "most": 8}}, 8),
        (partly(({"CPU": 2, "GPU": 1}, {"CPU": 1, "GPU": 1})), {"workers": {"most": 8, "cpus": 0, "gpus": 1}}, 8),
        (partly(({"CPU": 4}, {"CPU": 3})), {"workers": {"most": 8}}, 3),
        (partly(({"CPU": 4}, {"CPU": 1})), {"workers": {"least": 2, "most": 8}}, 2),
        (free({"CPU": 4}), {"workers": {"most": 8}, "experts": {"cpus": 1.0}}, 2),
        (free(), {"workers": {"most": 8}, "experts": {"cpus": 1.0}}, 1),
        (free({"CPU": 1}), {"workers": {"least": 10, "most": 12, "cpus": 0.1}}, 10),
    ],
)
def test_a_run_grows_only_where_nothing_else_reserves_what_its_workers_do(
    raw: dict[str, object], room: Room, given: dict[str, object], most: int
) -> None:
    assert most_workers(parse_recipe(raw | given), room, grows=True) == most


def counted_by_ray(has: Sequence[Amounts], each: float, least: int, most: int) -> int:
    """Workers that Ray Train's elastic policy would begin with, from its own code and its coordinator's."""
    bundle = {"CPU": each}
    request = coordinator.OngoingRequest(
        first_request_time=0.0,
        requested_resources=[bundle] * most,
        expiration_time=9.0,
        request_remaining=frozenset(),
        priority=1,
        reserved_resources={},
        requested_label_selectors=[],
        strategy=coordinator.ResourceRequestStrategy.PACK,
    )
    nodes = {str(place): dict(node) for place, node in enumerate(has)}
    reserved: dict[str, Amounts] = {}
    for node_id, placed in coordinator._compute_reservations(request, nodes).items():
        coordinator._add_bundle_in_place(reserved.setdefault(node_id, {}), placed)
    policy = ElasticScalingPolicy(ScalingConfig(num_workers=(least, most), resources_per_worker=bundle))
    return policy._count_possible_workers(reserved)


@pytest.mark.parametrize("each", [1.0, 0.5, 0.3, 0.1])
def test_ray_train_counts_what_it_is_expected_to(raw: dict[str, object], each: float) -> None:
    has = [{"CPU": 4.0}] * 2
    for most in (2, 5, 11, 26, 100):
        assert _planned(has, {"CPU": each}, most) == counted_by_ray(has, each, 1, most)
    assert counted_by_ray(has, each, 1, 100) > 4 / each  # though half of it is reserved
    room = partly(*[({"CPU": 4.0}, {"CPU": 2.0})] * 2)
    for grows in (False, True):
        most = most_workers(parse_recipe(raw | {"workers": {"least": 2, "most": 100, "cpus": each}}), room, grows)
        assert most == 2 * int(2 / each + 1e-9)
        assert 2 <= counted_by_ray(has, each, 2, most) <= most


def find_room(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, room: Room, cluster: bool) -> tuple[int, str]:
    """Most workers, and what is said."""
    out = io.StringIO()
    monkeypatch.setattr(driver, "look", lambda _: room)
    monkeypatch.setattr(driver, "on_cluster", lambda: cluster)
    return driver._find_room(recipe, ServiceSpec("run", "model"), Console(file=out, width=300)), out.getvalue()


def test_a_cluster_is_waited_for_and_a_private_ray_is_not(
    raw: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(raw | {"workers": {"least": 3}})
    assert find_room(monkeypatch, recipe, free({"CPU": 2}), True) == (
        3,
        "waiting for room: 3 workers with workers.cpus 1 reserve 3 CPUs, of which there are 2: lower one of them\n",
    )
    with pytest.raises(ValueError, match=r"3 workers with workers\.cpus 1 reserve 3 CPUs, of which there are 2"):
        find_room(monkeypatch, recipe, free({"CPU": 2}), False)


def test_fewer_workers_than_wanted_are_said(raw: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(raw | {"workers": {"most": 8}})
    half = partly(({"CPU": 4}, {"CPU": 2}))
    for cluster in (True, False):
        assert find_room(monkeypatch, recipe, half, cluster) == (2, "2 workers: as many as there is room for now\n")
    assert find_room(monkeypatch, recipe, free({"CPU": 4}), True) == (8, "")
    assert find_room(monkeypatch, parse_recipe(raw | {"workers": {"least": 2}}), half, False) == (2, "")


def test_room_is_what_living_nodes_have_and_what_is_free_there(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"NodeID": "b", "Alive": False, "Resources": {"CPU": 9.0}},
        {"NodeID": "c", "Alive": True, "Resources": {"CPU": 2.0}},  # of which nothing is known yet
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: {"a": {"CPU": 3.0}, "b": {}})

    def nobody(namespace: str) -> None:
        raise ValueError(namespace)

    monkeypatch.setattr(discovery, "find_controller", nobody)
    found = partly(({"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0}), ({"CPU": 2.0}, {"CPU": 2.0}))
    assert look(ServiceSpec("run", "model")) == found
    hosts = [{"pid": 7}, {"pid": None}, {"pid": 8}]
    controller = SimpleNamespace(status=SimpleNamespace(remote=lambda: {"expert_hosts": hosts}))
    monkeypatch.setattr(discovery, "find_controller", lambda namespace: controller)
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    assert look(ServiceSpec("run", "model")) == replace(found, hosts=2)


def test_ray_is_told_that_clusters_stay_on_one_machine_before_it_is_imported() -> None:
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    watch = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, module, path=None, target=None):\n"
        f"        if module == 'ray': print(os.environ.get({name!r}))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import services.training.driver\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != name}
    ran = subprocess.run([sys.executable, "-c", watch], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split()[0] == "0"


def test_hosts_keep_the_threads_that_they_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(name: str, cpus: float) -> Node:
        return Node(name, frozenset({name}), cpus)

    monkeypatch.setattr("cluster.nodes.living_nodes", lambda resource: [node("head", 0), node("a", 8), node("b", 8)])
    monkeypatch.setattr("cluster.nodes.gethostname", lambda: "head")
    monkeypatch.setattr("cluster.nodes.node_threads", lambda: 2)  # of the driver's pod
    run = ServiceSpec("run", "model", hosts=4, trains=True)
    assert with_threads(run).threads == 4  # two on each of the nodes with cores
    assert with_threads(replace(run, threads=3)).threads == 3
    assert with_threads(replace(run, lodges_with="p8000")).threads is None  # their hosts say
