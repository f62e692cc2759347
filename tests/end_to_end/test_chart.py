"""The chart's promise on real Ray nodes: Helm scales expert hosts, pods go and die, and no stream notices."""

import base64
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import helm_python as helm
import httpx
import pytest
import yaml

from tests.end_to_end.clients import wait_until
from tests.end_to_end.kuberay import NAMESPACE, RELEASE, LocalKubernetes
from tests.end_to_end.prompts import mixed_bodies
from tests.end_to_end.streams import Body, run_streams
from tests.end_to_end.test_training import write_recipe
from tests.helm.charts import CHART, Values
from tests.helm.fake_api import FakeApi, fake_cluster
from tests.helm.fake_store import Object, Place

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # of slow machines

STREAMS = 16
TOKENS = 64
API_KEY, ADMIN = "api-key-of-the-tests", "admin-token-of-the-tests"
Answers = list[tuple[object, ...]]


class Release:
    """The chart, installed: Helm's configuration, the stand-ins behind it, and the service's own routes."""

    def __init__(self, config: helm.Config, kubernetes: LocalKubernetes, api: FakeApi, model: Path) -> None:
        self.config, self.kubernetes, self.api = config, kubernetes, api
        self._model = model

    def values(self, replicas: int, workers: int = 1, jobs: Sequence[Values] = ()) -> Values:
        experts = {"replicas": replicas, "cpu": 1, "drainSeconds": 120}
        attention = {"replicas": workers, "cpu": 1, "maxLength": 512, "drainSeconds": 10}
        model, outputs = {"path": str(self._model)}, {"claim": "outputs"}
        groups = {"experts": experts, "attention": attention}
        return {"model": model, **groups, "jobs": [*jobs], "outputs": outputs}

    def install(self, replicas: int) -> None:
        self.config.install(CHART, RELEASE, self.values(replicas), timeout=600)

    def upgrade(self, replicas: int, workers: int = 1, jobs: Sequence[Values] = ()) -> None:
        self.config.upgrade(CHART, RELEASE, self.values(replicas, workers, jobs), timeout=600, reset_values=True)

    def status(self) -> dict[str, Any]:
        """An error's document while the controller is away."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        report: dict[str, Any] = httpx.get(f"{self.kubernetes.url}/admin/status", headers=headers, timeout=30).json()
        return report

    def begin(self, route: str, **wish: Any) -> httpx.Response:
        """Ask for a change of the expert hosts."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return httpx.post(f"{self.kubernetes.url}/admin/experts/{route}", headers=headers, json=wish, timeout=30)

    def make_room(self, **wish: Any) -> None:
        wait_until(lambda: bool(self.begin("room", **wish).json()["done"]))

    def jobs(self) -> list[str]:
        """How the RayJobs ended; nothing of those that run."""
        jobs = self.api.store.list("rayjobs.ray.io", NAMESPACE)[0]
        return [job["status"]["jobStatus"] for job in jobs if "status" in job]

    def homes(self) -> list[str]:
        """The nodes of the hosts that serve, if all do and nothing is under way."""
        report = self.status()
        ready = report.get("state") == "ready" and report["change"] is None
        return sorted(host["node"] for host in report["expert_hosts"]) if ready else []

    def settle(self, hosts: int) -> None:
        """Until there are so many hosts, each on a node of its own, and as many nodes."""
        wait_until(
            lambda: len(homes := self.homes()) == len(set(homes)) == hosts == self.status()["nodes"]["nodes"], 400
        )


@pytest.fixture(scope="module")
def release(checkpoint: Callable[[str], Path]) -> Iterator[Release]:
    with LocalKubernetes() as kubernetes, fake_cluster(kubernetes.run) as api:
        data = {"api-key": API_KEY, "admin-token": ADMIN}
        secret: Object = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "shoal-auth"},
            "data": {name: base64.b64encode(value.encode()).decode() for name, value in data.items()},
        }
        api.store.create(Place("secrets", NAMESPACE, "shoal-auth"), secret)
        kubernetes.follow(api)
        with helm.Config(kubeconfig_content=api.kubeconfig, namespace=NAMESPACE, qps=1000, burst_limit=1000) as config:
            made = Release(config, kubernetes, api, checkpoint("tiny"))
            try:
                made.install(2)
                made.settle(2)
                yield made
            finally:
                print("\n".join(kubernetes.logs))


@pytest.fixture(scope="module")
def bodies(release: Release) -> list[Body]:
    return mixed_bodies(release.status()["model_id"], STREAMS, TOKENS)


@pytest.fixture(scope="module")
def expected(release: Release, bodies: list[Body]) -> Answers:
    """What the streams give when nothing happens."""
    streams, _ = run_streams(release.kubernetes.url, bodies, key=API_KEY)
    assert [stream.error for stream in streams] == [None] * STREAMS
    return [stream.answer for stream in streams]


def meanwhile(release: Release, bodies: list[Body], expected: Answers, harm: Callable[[], object]) -> None:
    """`harm` while streams run again and again until it is over: every token and log-probability is as expected.

    Between two rounds the cores are as long the nodes' that start and end.
    """
    with ThreadPoolExecutor(1) as pool:
        harmed: list[Future[object]] = []
        while not harmed or not harmed[0].done():
            begin = None if harmed else lambda: harmed.append(pool.submit(harm))
            began_s = time.monotonic()
            streams, _ = run_streams(release.kubernetes.url, bodies, begin, key=API_KEY)
            assert [stream.answer for stream in streams] == expected
            wait(harmed, timeout=time.monotonic() - began_s)
        harmed[0].result()


def test_helm_scales_expert_hosts_and_no_stream_notices(
    release: Release, bodies: list[Body], expected: Answers
) -> None:
    def grow() -> None:
        release.upgrade(4)
        release.settle(4)

    def shrink() -> None:
        release.upgrade(1)
        release.settle(1)

    def roll_back() -> None:
        release.config.rollback(RELEASE, version=1, timeout=600)
        release.settle(2)

    for harm in (grow, shrink, roll_back):
        meanwhile(release, bodies, expected, harm)
    assert [revision["status"] for revision in release.config.history(RELEASE)] == [
        "superseded",
        "superseded",
        "superseded",
        "deployed",
    ]
    stops = [log for log in release.kubernetes.logs if log.startswith("preStop")]
    assert len(stops) == 3
    assert all(": 0 after" in stop for stop in stops), stops


def test_a_lost_pod_is_replaced_and_no_stream_notices(release: Release, bodies: list[Body], expected: Answers) -> None:
    def lose() -> None:
        before = release.homes()
        release.kubernetes.nodes("experts")[0].kill()
        wait_until(lambda: len(homes := release.homes()) == len(set(homes)) == 2 and homes != before, 400)
        release.settle(2)

    meanwhile(release, bodies, expected, lose)


def test_a_standby_waits_on_each_node_and_the_dead_come_back_where_they_were(release: Release) -> None:
    release.settle(2)
    wait_until(lambda: len(release.status()["standby"]) == 2)
    before = release.status()["expert_hosts"]
    for index, host in enumerate(before):
        os.kill(host["pid"], signal.SIGKILL)

        def is_back(index: int = index, host: dict[str, Any] = host) -> bool:
            now = release.status()["expert_hosts"][index]
            return now["generation"] > host["generation"] and len(release.homes()) == 2

        wait_until(is_back)
    assert [host["node"] for host in release.status()["expert_hosts"]] == [host["node"] for host in before]


def test_attention_workers_come_and_go_and_no_stream_notices(
    release: Release, bodies: list[Body], expected: Answers
) -> None:
    def workers() -> list[str]:
        return [worker["node"] for worker in release.status().get("attention_workers", ())]

    def grow() -> None:
        release.upgrade(2, workers=2)
        wait_until(lambda: len(set(workers())) == 2, 300)

    def shrink() -> None:
        (oldest, _) = release.kubernetes.nodes("attention")  # where the ingress and the controller are
        release.upgrade(2, workers=1)
        wait_until(lambda: not oldest.alive and len(workers()) == 1 and len(release.homes()) == 2, 300)

    for harm in (grow, shrink):
        meanwhile(release, bodies, expected, harm)


def test_what_was_asked_for_outlives_the_controller(release: Release) -> None:
    release.make_room(hosts=1)
    controller = release.status()["controller"]["pid"]
    os.kill(controller, signal.SIGKILL)
    wait_until(lambda: release.status().get("controller", {}).get("pid", controller) != controller)
    wait_until(lambda: len(release.homes()) == 1)
    nodes = {"resource": "shoal_expert", "nodes": 2, "wanted": 1, "at_most": 1, "emptied": []}
    assert release.status()["nodes"] == nodes
    release.make_room(hosts=2)
    wait_until(lambda: len(release.homes()) == 2)


def test_the_last_node_is_not_emptied_and_hosts_are_not_counted_by_hand(release: Release) -> None:
    first, second = release.kubernetes.nodes("experts")
    release.make_room(node=first.address)
    assert len(release.homes()) == 1
    for route, wish, said in (
        ("room", {"node": second.address}, "is the last one"),
        ("room", {"node": "10.9.9.9"}, "no node for expert hosts called '10.9.9.9'"),
        ("scale", {"hosts": 2}, "follow the nodes"),
        ("drain", {"host": "host-0"}, "follow the nodes"),
    ):
        refused = release.begin(route, **wish)
        assert (refused.status_code, said in refused.text) == (400, True), refused.text


def test_a_recipe_is_trained_on_the_same_cluster_and_no_stream_notices(
    release: Release, bodies: list[Body], expected: Answers, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = yaml.safe_load(write_recipe(tmp_path, checkpoint("tiny"), steps=3).read_text())
    recipe["workers"]["cpus"] = 0.2  # beside the attention worker of a node of one CPU

    def train() -> None:
        release.upgrade(2, jobs=[{"name": "sft", "recipe": recipe, "args": [f"output_dir={tmp_path / 'out'}"]}])
        wait_until(lambda: release.jobs() == ["SUCCEEDED"], 500)

    meanwhile(release, bodies, expected, train)
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_helms_own_test_asks_for_a_completion(release: Release) -> None:
    release.config.test(RELEASE, timeout=60)


def test_a_request_without_the_key_is_refused(release: Release) -> None:
    assert httpx.get(f"{release.kubernetes.url}/v1/models").status_code == 401
    assert httpx.get(f"{release.kubernetes.url}/admin/status").status_code == 401
