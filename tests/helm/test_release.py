"""A release's life, by Helm itself, against the stand-in for Kubernetes: what is there after each step."""

from collections.abc import Iterator

import helm_python as helm
import pytest

from tests.helm.charts import CHART, Values, groups, merge
from tests.helm.fake_api import FakeApi, fake_cluster, finish
from tests.helm.fake_store import NAMESPACE, Object, Place

CLUSTER = Place("rayclusters.ray.io", NAMESPACE, "shoal")
SERVE = Place("configmaps", NAMESPACE, "shoal-serve")
KEYS = {"api-key": "a2V5", "admin-token": "dG9rZW4="}
ALWAYS = {("namespaces", NAMESPACE), ("secrets", "shoal-auth"), ("configmaps", "kube-root-ca.crt")}
INSTALLED = {
    ("configmaps", "shoal-recipes"),
    ("configmaps", "shoal-serve"),
    ("networkpolicies.networking.k8s.io", "shoal"),
    ("poddisruptionbudgets.policy", "shoal-experts"),
    ("rayclusters.ray.io", "shoal"),
    ("services", "shoal"),
}


class Jobs:
    """Ends jobs and pods at once, those that are named here badly."""

    def __init__(self) -> None:
        self.failing: set[str] = set()

    def __call__(self, made: Object) -> None:
        finish(made, ok=made["metadata"]["name"] not in self.failing)


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def api(jobs: Jobs) -> Iterator[FakeApi]:
    """A cluster with the namespace's own config map and the secret that the chart asks for."""
    with fake_cluster(jobs) as api:
        put(api, "ConfigMap", "configmaps", "kube-root-ca.crt")
        put(api, "Secret", "secrets", "shoal-auth", KEYS)
        yield api


def put(api: FakeApi, kind: str, resource: str, name: str, data: dict[str, str] | None = None) -> None:
    made: Object = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "data": data or {}}
    api.store.create(Place(resource, NAMESPACE, name), made)


def install(config: helm.Config, values: Values | None = None) -> helm.config.Release:
    return config.install(CHART, "shoal", values or {}, timeout=20)


def upgrade(config: helm.Config, values: Values) -> helm.config.Release:
    return config.upgrade(CHART, "shoal", values, timeout=20, reset_values=True)


def present(api: FakeApi) -> set[tuple[str, str]]:
    """What is there beside what was before and Helm's own records."""
    places = {(place.resource, place.name) for place in api.store.places()}
    return {place for place in places if not place[1].startswith("sh.helm.")} - ALWAYS


def happened(api: FakeApi, after: int) -> list[tuple[str, str]]:
    """Kind and name of each event that is about a job, a test or the cluster."""
    told = ("jobs.batch", "pods", "rayclusters.ray.io")
    return [(event.kind, event.place.name) for event in api.store.since(after) if event.place.resource in told]


def drained_to(api: FakeApi, after: int) -> int:
    """What the one drain job since then was told."""
    jobs = [event.object for event in api.store.since(after) if event.place.name == "shoal-drain"]
    (script,) = jobs[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    return int(script.split("--to ")[1].split()[0])


def replicas(api: FakeApi) -> int:
    return int(groups(api.store.get(CLUSTER))["experts"]["replicas"])


def test_install_makes_the_objects_then_deploys_the_application(api: FakeApi, config: helm.Config) -> None:
    release = install(config)
    assert release["status"] == "deployed"
    assert "port-forward service/shoal" in release["notes"]
    assert present(api) == INSTALLED  # hooks that succeeded are gone
    assert happened(api, 0) == [("ADDED", "shoal"), ("ADDED", "shoal-deploy"), ("DELETED", "shoal-deploy")]


def test_more_replicas_patch_one_number_in_place(api: FakeApi, config: helm.Config) -> None:
    install(config)
    before, serve, version = api.store.get(CLUSTER), api.store.get(SERVE), api.store.version
    upgrade(config, {"experts": {"replicas": 4}})
    after = api.store.get(CLUSTER)
    assert happened(api, version) == [
        ("ADDED", "shoal-drain"),
        ("DELETED", "shoal-drain"),
        ("MODIFIED", "shoal"),
        ("ADDED", "shoal-deploy"),
        ("DELETED", "shoal-deploy"),
    ]
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"] + 1
    groups(before)["experts"]["replicas"] = 4
    assert after["spec"] == before["spec"]
    assert api.store.get(SERVE) == serve


def test_an_upgrade_that_changes_nothing_touches_no_object(api: FakeApi, config: helm.Config) -> None:
    install(config)
    version = api.store.version
    upgrade(config, {})
    touched = {event.place.name for event in api.store.since(version) if event.place.resource != "secrets"}
    assert touched == {"shoal-drain", "shoal-deploy"}


def test_fewer_replicas_are_drained_to_first_and_rollback_brings_them_back(api: FakeApi, config: helm.Config) -> None:
    install(config, {"experts": {"replicas": 4}})
    first = api.store.get(CLUSTER)
    version = api.store.version
    upgrade(config, {"experts": {"replicas": 2}})
    assert replicas(api) == 2
    assert happened(api, version)[:3] == [("ADDED", "shoal-drain"), ("DELETED", "shoal-drain"), ("MODIFIED", "shoal")]
    assert drained_to(api, version) == 2
    version = api.store.version
    config.rollback("shoal", version=1, timeout=20)
    assert drained_to(api, version) == 4
    assert api.store.get(CLUSTER)["spec"] == first["spec"]
    assert [revision["status"] for revision in config.history("shoal")] == ["superseded", "superseded", "deployed"]


def test_a_drain_that_fails_keeps_the_cluster_as_it_is(api: FakeApi, config: helm.Config, jobs: Jobs) -> None:
    install(config, {"experts": {"replicas": 4}})
    before = api.store.get(CLUSTER)
    jobs.failing = {"shoal-drain"}
    with pytest.raises(helm.HelmReleaseError, match="shoal-drain"):
        upgrade(config, {"experts": {"replicas": 2}})
    assert api.store.get(CLUSTER) == before
    assert ("jobs.batch", "shoal-drain") in present(api)  # with its log
    jobs.failing = set()
    upgrade(config, {"experts": {"replicas": 2}})
    assert replicas(api) == 2
    assert present(api) == INSTALLED


def test_an_application_that_does_not_deploy_fails_the_install(api: FakeApi, config: helm.Config, jobs: Jobs) -> None:
    jobs.failing = {"shoal-deploy"}
    with pytest.raises(helm.HelmReleaseError, match="shoal-deploy"):
        install(config)
    assert config.status("shoal")["status"] == "failed"
    jobs.failing = set()
    assert upgrade(config, {})["status"] == "deployed"


def test_features_come_and_go_with_their_values(api: FakeApi, config: helm.Config) -> None:
    monitored: Values = {"monitoring": {"podMonitor": True, "dashboard": True}}
    job = {"name": "sft", "recipe": {"output_dir": "/outputs/a", "steps": 1}}
    keda = merge(monitored, {"keda": {"enabled": True}, "jobs": [job], "outputs": {"claim": "outputs"}})
    put(api, "PersistentVolumeClaim", "persistentvolumeclaims", "outputs")
    install(config, keda)
    extra = present(api) - INSTALLED - {("persistentvolumeclaims", "outputs")}
    assert {resource for resource, _ in extra} == {
        "configmaps",
        "deployments.apps",
        "podmonitors.monitoring.coreos.com",
        "rayjobs.ray.io",
        "scaledobjects.keda.sh",
    }
    (first,) = (name for resource, name in extra if resource == "rayjobs.ray.io")
    upgrade(config, merge(keda, {"jobs": [job | {"args": ["steps=2"]}]}))
    assert ("rayjobs.ray.io", first) not in present(api)
    assert len(present(api)) == len(extra) + len(INSTALLED) + 1
    upgrade(config, {})
    assert present(api) == INSTALLED | {("persistentvolumeclaims", "outputs")}


def test_what_others_set_stays_and_what_they_took_is_not_overwritten(api: FakeApi, config: helm.Config) -> None:
    scaled: Values = {
        "autoscaling": {"enabled": True},
        "experts": {"replicas": None},
        "networkPolicy": {"egressCIDRs": ["10.0.0.0/8"]},
    }
    install(config, scaled)
    api.store.merge(CLUSTER, {"status": {"state": "ready"}, "metadata": {"annotations": {"seen": "yes"}}})
    upgrade(config, scaled)
    made = api.store.get(CLUSTER)
    assert (made["status"], made["metadata"]["annotations"]["seen"]) == ({"state": "ready"}, "yes")
    workers = made["spec"]["workerGroupSpecs"]
    workers[1]["replicas"] = 5  # as Ray's autoscaler does
    api.store.merge(CLUSTER, {"spec": {"workerGroupSpecs": workers}})
    with pytest.raises(helm.HelmReleaseError, match=r"conflict.*workerGroupSpecs"):
        upgrade(config, scaled)
    assert replicas(api) == 5


def test_uninstall_leaves_nothing_but_the_secret(api: FakeApi, config: helm.Config) -> None:
    install(config, {"monitoring": {"podMonitor": True, "rules": True, "dashboard": True}})
    config.test("shoal", timeout=20)
    config.uninstall("shoal", timeout=20)
    assert present(api) == set()
    assert {(place.resource, place.name) for place in api.store.places()} == ALWAYS


def test_helms_test_succeeds_and_fails_with_its_pod(api: FakeApi, config: helm.Config, jobs: Jobs) -> None:
    install(config)
    config.test("shoal", timeout=20)
    jobs.failing = {"shoal-test"}
    with pytest.raises(helm.HelmReleaseError, match="shoal-test"):
        config.test("shoal", timeout=20)


def test_values_that_are_refused_change_nothing(api: FakeApi, config: helm.Config) -> None:
    install(config)
    version = api.store.version
    for bad in ({"experts": {"replicas": -1}}, {"autoscaling": {"enabled": True}}):
        with pytest.raises(helm.HelmError):
            upgrade(config, bad)
    assert api.store.version == version
