"""The chart's promise on real Ray nodes: Helm scales expert hosts, pods go and die, and no stream notices."""

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import helm_python as helm
import httpx
import pytest

from tests.end_to_end.clients import wait_until
from tests.end_to_end.kuberay import NAMESPACE, RELEASE, LocalKubernetes
from tests.end_to_end.prompts import mixed_bodies
from tests.end_to_end.streams import Body, run_streams
from tests.helm.charts import CHART, Values
from tests.helm.fake_api import FakeApi, fake_cluster
from tests.helm.fake_store import Object, Place

pytestmark = pytest.mark.ray

STREAMS = 16
TOKENS = 64
API_KEY, ADMIN = "api-key-of-the-tests", "admin-token-of-the-tests"
Answers = list[tuple[object, ...]]


class Release:
    """The chart, installed: Helm's configuration, the stand-ins behind it, and the service's own routes."""

    def __init__(self, config: helm.Config, kubernetes: LocalKubernetes, api: FakeApi, model: Path) -> None:
        self.config, self.kubernetes, self.api = config, kubernetes, api
        self._model = model

    def values(self, replicas: int) -> Values:
        experts = {"replicas": replicas, "cpu": 1, "drainSeconds": 60}
        return {"model": {"path": str(self._model)}, "experts": experts, "attention": {"cpu": 1, "maxLength": 512}}

    def install(self, replicas: int) -> None:
        self.config.install(CHART, RELEASE, self.values(replicas), timeout=300)

    def upgrade(self, replicas: int) -> None:
        self.config.upgrade(CHART, RELEASE, self.values(replicas), timeout=300, reset_values=True)

    def status(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {ADMIN}"}
        report: dict[str, Any] = httpx.get(f"{self.kubernetes.url}/admin/status", headers=headers, timeout=30).json()
        return report

    def homes(self) -> list[str]:
        """The nodes of the hosts that serve, if all do and nothing is under way."""
        report = self.status()
        ready = report["state"] == "ready" and report["change"] is None
        return sorted(host["node"] for host in report["expert_hosts"]) if ready else []

    def settle(self, hosts: int) -> None:
        """Until there are so many hosts, each on a node of its own, and as many nodes."""
        wait_until(
            lambda: len(homes := self.homes()) == len(set(homes)) == hosts == self.status()["nodes"]["nodes"], 90
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
    """`harm` while streams run again and again until it is over: every token and log-probability is as expected."""
    with ThreadPoolExecutor(1) as pool:
        harmed: list[Future[object]] = []
        while not harmed or not harmed[0].done():
            begin = None if harmed else lambda: harmed.append(pool.submit(harm))
            streams, _ = run_streams(release.kubernetes.url, bodies, begin, key=API_KEY)
            assert [stream.answer for stream in streams] == expected
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
        release.config.rollback(RELEASE, version=1, timeout=300)
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
        release.kubernetes.experts()[0].kill()
        wait_until(lambda: release.homes() != before and len(set(release.homes())) == 2, 90)

    meanwhile(release, bodies, expected, lose)


def test_helms_own_test_asks_for_a_completion(release: Release) -> None:
    release.config.test(RELEASE, timeout=60)


def test_a_request_without_the_key_is_refused(release: Release) -> None:
    assert httpx.get(f"{release.kubernetes.url}/v1/models").status_code == 401
    assert httpx.get(f"{release.kubernetes.url}/admin/status").status_code == 401
