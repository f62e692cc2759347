"""Whatever is switched on, alone or with anything else: objects that Kubernetes and KubeRay take."""

from pathlib import Path
from typing import Any

import helm_python as helm
import jsonschema
import pytest

from tests.helm.charts import (
    CHART,
    EXAMPLES,
    NEWEST,
    OLDEST,
    Values,
    check_schema,
    example,
    merge,
    pods,
    render,
    serve_config,
)
from tests.helm.fake_store import Object

REACH: Values = {"networkPolicy": {"egressCIDRs": ["10.0.0.0/8"]}}
FEATURES: dict[str, Values] = {
    "pvc": {"model": {"source": "pvc", "path": "/models/lite", "pvc": {"claim": "models", "subPath": "a"}}},
    "image": {"model": {"source": "image", "path": "/models", "image": {"reference": "registry/lite:1"}}},
    "object store": {
        "model": {"source": "objectStore", "path": "/models/lite", "objectStore": {"url": "s3:b/lite", "secret": "s"}}
    }
    | REACH,
    "shape": {"model": {"shape": {"hiddenSize": 256, "moeIntermediateSize": 96, "routedExperts": 16, "moeLayers": 3}}},
    "open ray": {"ray": {"tokenAuth": False}},
    "own ray token": {"ray": {"tokenSecret": "ray-token"}},
    "embedded": {"ray": {"gcs": {"faultTolerance": "embedded", "storageClass": "ssd"}}},
    "redis": {"ray": {"gcs": {"faultTolerance": "redis", "redisAddress": "redis:6379", "redisSecret": "r"}}} | REACH,
    "recreate": {"ray": {"upgradeStrategy": "Recreate"}},
    "gpus": {"attention": {"gpus": 1, "extraResources": {"rdma/ib": 1}}, "experts": {"gpus": 1, "gpuMemory": "80Gi"}},
    "placed": {
        group: {"nodeSelector": {"pool": group}, "tolerations": [{"key": "a", "operator": "Exists"}]}
        for group in ("head", "attention", "experts")
    },
    "labels": {"attention": {"labels": {"team": "a"}}, "experts": {"labels": {"team": "b"}}},
    "several": {"attention": {"replicas": 3}, "experts": {"replicas": 5, "copies": 2}, "serve": {"ingressReplicas": 2}},
    "jobs": {
        "jobs": [
            {"name": "sft", "recipe": {"output_dir": "/outputs/sft"}, "args": ["steps=10"]},
            {"name": "grpo", "file": "/outputs/grpo.yaml", "deadlineSeconds": 3600},
        ],
        "outputs": {"claim": "outputs"},
    },
    "outputs": {"outputs": {"claim": "outputs"}},
    "tls": {"tls": {"secret": "shoal-tls", "serverName": "shoal"}},
    "ray tls": {"tls": {"ray": True}},
    "autoscaling": {"autoscaling": {"enabled": True}, "experts": {"replicas": None}} | REACH,
    "keda": {"keda": {"enabled": True}, "monitoring": {"podMonitor": True}},
    "no network policy": {"networkPolicy": {"enabled": False}},
    "clients": {"networkPolicy": {"clients": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}]}},
    "no disruption budget": {"podDisruptionBudget": {"enabled": False}},
    "security": {"security": {"user": 2000, "addCapabilities": ["IPC_LOCK"], "serviceAccountName": "shoal"}},
    "pull secrets": {"image": {"tag": "1", "pullPolicy": "Always", "pullSecrets": ["registry"]}},
    "monitoring": {"monitoring": {"podMonitor": True, "rules": True, "dashboard": True, "labels": {"release": "p"}}},
    "node port": {
        "service": {"type": "NodePort", "port": 80, "annotations": {"a": "b"}},
        "networkPolicy": {"clients": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]},
    },
}
EXCLUSIVE = [
    {"pvc", "image", "object store"},
    {"embedded", "redis"},
    {"open ray", "own ray token"},
    {"autoscaling", "keda"},
    {"ray tls", "keda"},
    {"autoscaling", "several"},
]
# Kubernetes' restricted profile, and what mounts an image
VOLUMES = {"configMap", "emptyDir", "secret", "persistentVolumeClaim", "image"}


def together(*names: str) -> bool:
    return not any(len(set(names) & exclusive) > 1 for exclusive in EXCLUSIVE)


def check_objects(objects: list[Object], version: str = NEWEST) -> None:
    places = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(places)) == len(places)
    for each in objects:
        assert len(each["metadata"]["name"]) <= 63
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"
        check_schema(each, version)
    for pod in pods(objects):
        check_pod(pod, version)


def check_pod(pod: Object, version: str) -> None:
    spec = pod["spec"]
    check_schema({"apiVersion": "v1", "kind": "Pod", "metadata": pod["metadata"], "spec": spec}, version)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume["name"]: volume.keys() - {"name"} for volume in spec["volumes"]}
    assert len(volumes) == len(spec["volumes"])
    assert {kind for kinds in volumes.values() for kind in kinds} <= VOLUMES
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"]["drop"] == ["ALL"]
        mounts = container["volumeMounts"]
        assert {mount["name"] for mount in mounts} <= volumes.keys()
        assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
        names = [variable["name"] for variable in container["env"]]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("values", [{}, *map(example, EXAMPLES)], ids=["defaults", *(path.stem for path in EXAMPLES)])
def test_lint_finds_nothing(values: Values) -> None:
    report = helm.lint(CHART, values, strict=True)
    found = [message["error"] for message in report["messages"] if message["severity"] > 1]
    assert (found, report["errors"]) == ([], [])


@pytest.mark.parametrize("at", range(len(FEATURES)), ids=list(FEATURES))
def test_a_feature_with_each_of_those_after_it_gives_valid_objects(at: int) -> None:
    first, *others = list(FEATURES)[at:]
    check_objects(render(FEATURES[first]))
    for second in others:
        if together(first, second):
            check_objects(render(merge(FEATURES[first], FEATURES[second])))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_give_valid_objects(path: Path) -> None:
    check_objects(render(example(path)))


def test_all_at_once_gives_valid_objects() -> None:
    chosen: list[str] = []
    for name in FEATURES:
        if together(*chosen, name):
            chosen.append(name)
    assert len(chosen) >= 20
    check_objects(render(merge(*(FEATURES[name] for name in chosen))))


@pytest.mark.parametrize("name", [None, *(name for name in FEATURES if name != "image")])  # image volumes are newer
def test_the_oldest_kubernetes_takes_them_too(name: str | None) -> None:
    check_objects(render(FEATURES[name] if name else {}), OLDEST)


def test_schemas_refuse_what_kuberay_does_not_know() -> None:
    (cluster,) = (each for each in render() if each["kind"] == "RayCluster")
    check_schema(cluster)
    for path, value in (
        (("spec", "workerGroups"), []),
        (("spec", "headGroupSpec", "replicas"), 1),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "mounts"), []),
        (("spec", "workerGroupSpecs", 0, "replicas"), "two"),
        (("spec", "authOptions", "mode"), "password"),
    ):
        *way, last = path
        place: Any = cluster
        for step in way:
            place = place[step]
        kept = place.get(last)
        place[last] = value
        with pytest.raises(jsonschema.ValidationError):
            check_schema(cluster)
        place[last] = kept
        if kept is None:
            del place[last]
    check_schema(cluster)


def test_pair_of_pods_and_labels_select_each_other() -> None:
    objects = render(merge(FEATURES["monitoring"], FEATURES["jobs"], FEATURES["keda"], FEATURES["several"]))
    by_labels = [pod["metadata"]["labels"] for pod in pods(objects)]

    def chosen(selector: dict[str, str]) -> set[str]:
        return {labels["app.kubernetes.io/component"] for labels in by_labels if selector.items() <= labels.items()}

    everything = {"head", "attention", "experts", "hook", "job", "test"}
    found = {}
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            found["Service"] = chosen(spec["selector"])
        elif each["kind"] in ("PodDisruptionBudget", "PodMonitor", "Deployment"):
            found[each["metadata"]["name"]] = chosen(spec["selector"]["matchLabels"])
        elif each["kind"] == "NetworkPolicy":
            found["NetworkPolicy"] = chosen(spec["podSelector"]["matchLabels"])
    assert found == {
        "Service": {"attention"},
        "demo-shoal": everything,
        "demo-shoal-attention": {"attention"},
        "demo-shoal-experts": {"experts"},
        "demo-shoal-experts-extra": {"experts"},
        "NetworkPolicy": everything,
    }


@pytest.mark.parametrize("name", ["1234", "true", "null"])
def test_names_that_yaml_reads_as_something_else_stay_names(name: str) -> None:
    model: Values = {"path": "/models", "pvc": {"claim": name, "subPath": name}, "source": "pvc"}
    values: Values = {
        "fullnameOverride": "shoal",
        "image": {"pullSecrets": [name]},
        "model": model,
        "auth": {"existingSecret": name, "apiKeyEntry": name},
        "ray": {"tokenSecret": name, "gcs": {"faultTolerance": "embedded", "storageClass": name}},
        "outputs": {"claim": name},
        "tls": {"secret": name, "serverName": name},
        "networkPolicy": {"operatorNamespace": name, "monitoringNamespace": name},
        "security": {"serviceAccountName": name},
    }
    objects = render(values, name=name, namespace=name)
    for each in objects:
        check_schema(each)
    assert serve_config(objects)["applications"][0]["args"]["tls"]["name"] == name
