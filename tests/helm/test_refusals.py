"""Values that cannot work are refused before anything is installed: the message names them and says what to do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest

from tests.helm.charts import EXAMPLES, Values, chart, example, merge, render

V2_LITE = {"hiddenSize": 2048, "moeIntermediateSize": 1408, "routedExperts": 64, "moeLayers": 26}
SHAPE: Values = {"model": {"shape": V2_LITE}}
PVC: Values = {"model": {"source": "pvc", "path": "/models", "pvc": {"claim": "m"}}}
SCALED: Values = {
    "autoscaling": {"enabled": True},
    "experts": {"replicas": None},
    "networkPolicy": {"egressCIDRs": ["10.0.0.0/8"]},
}


@pytest.mark.parametrize(
    ("values", "key", "fix"),
    [
        ({"experts": {"replicas": -1}}, "/experts/replicas", "got -1, want 1"),
        ({"experts": {"replicas": 0}}, "/experts/replicas", "got 0, want 1"),
        ({"experts": {"replicas": "two"}}, "/experts/replicas", "want null or integer"),
        ({"experts": {"replicas": 1.5}}, "/experts/replicas", "want null or integer"),
        ({"attention": {"replicas": None}}, "/attention", "missing property 'replicas'"),
        ({"ray": None}, "at ''", "missing property 'ray'"),
        ({"expert": {"replicas": 2}}, "'expert' not allowed", ""),
        ({"experts": {"replica": 2}}, "/experts", "'replica' not allowed"),
        ({"model": {"pvc": {"name": "m"}}}, "/model/pvc", "'name' not allowed"),
        ({"model": {"source": "s3"}}, "/model/source", "'bundled', 'pvc', 'image', 'objectStore'"),
        ({"experts": {"memory": "lots"}}, "/experts/memory", "does not match pattern"),
        ({"experts": {"cpu": "500m"}}, "/experts/cpu", "want integer"),
        ({"experts": {"transport": "udp"}}, "/experts/transport", "'auto', 'nixl', 'grpc'"),
        ({"experts": {"transport": "shared"}}, "/experts/transport", "'auto', 'nixl', 'grpc'"),
        ({"ray": {"gcs": {"faultTolerance": "etcd"}}}, "/ray/gcs/faultTolerance", "'none', 'embedded', 'redis'"),
        ({"service": {"port": 0}}, "/service/port", "got 0, want 1"),
        ({"jobs": [{"name": "sft"}]}, "/jobs/0", "missing property 'recipe'"),
        ({"jobs": [{"name": "sft", "file": "/a", "recipe": {"a": 1}}]}, "/jobs/0", "oneOf"),
        ({"jobs": [{"name": "sft", "file": "/a", "args": ["seed=$(id)"]}]}, "/jobs/0/args/0", "does not match pattern"),
        ({"networkPolicy": {"egressCIDRs": ["everywhere"]}}, "/networkPolicy/egressCIDRs/0", "does not match pattern"),
        ({"experts": {"tolerations": [{"key": "a", "effects": "NoSchedule"}]}}, "/experts/tolerations/0", "'effects'"),
        ({"security": {"user": 0}}, "/security/user", "got 0, want 1"),
        ({"model": {"shape": {"dtype": "int8"}}}, "/model/shape/dtype", "'bfloat16'"),
        ({"model": {"pvc": {"subPath": "/lite"}}}, "/model/pvc/subPath", "does not match pattern"),
        ({"experts": {"extraResources": {"rdma/ib": "all"}}}, "/experts/extraResources/rdma~1ib", "does not match"),
        ({"experts": {"gpus": 2}}, "/experts/gpus", "got 2, want 1"),
        ({"attention": {"gpus": 8}}, "/attention/gpus", "got 8, want 1"),
        ({"jobs": [{"name": "sft", "file": "/a"}] * 2}, "/jobs", "items at 0 and 1 are equal"),
    ],
)
def test_the_schema_refuses(values: Values, key: str, fix: str) -> None:
    with pytest.raises(helm.HelmValuesError) as refused:
        render(values)
    assert key in str(refused.value)
    assert fix in str(refused.value)


@pytest.mark.parametrize(
    ("values", "key", "fix"),
    [
        ({"autoscaling": {"enabled": True}}, "experts.replicas is 2", "set experts.replicas=null"),
        ({"experts": {"replicas": None}}, "experts.replicas is null", "autoscaling.enabled=true"),
        (
            merge(SCALED, {"keda": {"enabled": True}}),
            "autoscaling.enabled and keda.enabled",
            "set one of them to false",
        ),
        ({"keda": {"enabled": True}}, "keda.enabled", "set monitoring.podMonitor=true"),
        ({"monitoring": {"rules": True}}, "monitoring.rules", "set monitoring.podMonitor=true"),
        ({"experts": {"replicas": 9, "maxReplicas": 8}}, "experts.replicas is 9", "raise experts.maxReplicas"),
        ({"experts": {"replicas": 2, "minReplicas": 3}}, "experts.minReplicas=3", "lower experts.minReplicas"),
        (merge(SCALED, {"experts": {"minReplicas": 9, "maxReplicas": 8}}), "experts.minReplicas is 9", "raise"),
        ({"experts": {"copies": 3}}, "experts.copies is 3", "set experts.replicas=3"),
        (
            {"experts": {"replicas": 3, "minReplicas": 1, "copies": 2}},
            "experts.minReplicas is 1 with experts.copies=2",
            "set experts.minReplicas=2",
        ),
        (merge(SCALED, {"experts": {"minReplicas": 1, "copies": 2}}), "experts.minReplicas is 1", "or leave it null"),
        (
            {"keda": {"enabled": True}, "monitoring": {"podMonitor": True}, "tls": {"ray": True}},
            "keda.enabled with tls.ray",
            "set one of them to false",
        ),
        (
            merge(SHAPE, {"experts": {"replicas": 65, "maxReplicas": 70}}),
            "experts.replicas is 65",
            "use at most so many",
        ),
        ({"model": {"source": "pvc", "path": "/models"}}, "model.pvc.claim is empty", "set it"),
        ({"model": {"source": "image", "path": "/models"}}, "model.image.reference is empty", "set it"),
        ({"model": {"source": "objectStore", "path": "/models"}}, "model.objectStore.url is empty", "set it"),
        ({"model": {"source": "pvc", "pvc": {"claim": "m"}}}, "model.path is /opt", "model.path=/models"),
        ({"model": {"path": "/models/lite"}}, "model.path is /models/lite", "set model.source"),
        ({"model": {"pvc": {"claim": "m"}}}, "model.pvc.claim is m", "set model.source=pvc, or leave it empty"),
        ({"model": {"image": {"reference": "r/m:1"}}}, "model.image.reference is r/m:1", "set model.source=image"),
        ({"model": {"objectStore": {"url": "s3:m"}}}, "model.objectStore.url is s3:m", "set model.source=objectStore"),
        (
            merge(PVC, {"model": {"objectStore": {"url": "s3:m"}}}),
            "model.objectStore.url is s3:m, which model.source=pvc",
            "set model.source=objectStore",
        ),
        ({"model": {"objectStore": {"secret": "s"}}}, "model.objectStore.secret is s", "or leave it empty"),
        ({"model": {"pvc": {"subPath": "a"}}}, "model.pvc.subPath is a", "set model.source=pvc"),
        ({"model": {"shape": V2_LITE | {"moeLayers": 0}}}, "model.shape.moeLayers is 0", "config.json"),
        ({"model": {"shape": {"hiddenSize": 64}}}, "model.shape.moeIntermediateSize is 0", "all four to 0"),
        (merge(SHAPE, {"experts": {"gpus": 1, "replicas": 1}}), "experts.gpuMemory is empty", "set it"),
        ({"ray": {"gcs": {"faultTolerance": "redis"}}}, "ray.gcs.redisAddress is empty", "set host:port"),
        (
            {"ray": {"gcs": {"redisAddress": "redis:6379"}}},
            "ray.gcs.redisAddress is redis:6379, which ray.gcs.faultTolerance=none",
            "set ray.gcs.faultTolerance=redis",
        ),
        (
            {"ray": {"gcs": {"faultTolerance": "embedded", "redisSecret": "r"}}},
            "ray.gcs.redisSecret is r",
            "or leave it empty",
        ),
        ({"ray": {"tokenAuth": False, "tokenSecret": "t"}}, "ray.tokenSecret is t", "set ray.tokenAuth=true"),
        ({"attention": {"maxLength": 40000}}, "attention.maxLength is 40000", "raise attention.cacheTokens"),
        ({"attention": {"extraResources": {"cpu": "8"}}}, "attention.extraResources has cpu", "set attention.cpu"),
        ({"experts": {"extraResources": {"memory": "8Gi"}}}, "experts.extraResources has memory", "experts.memory"),
        ({"experts": {"gpuMemory": "80Gi"}}, "experts.gpuMemory is 80Gi", "set experts.gpus=1"),
        ({"ray": {"gcs": {"storageClass": "ssd"}}}, "ray.gcs.storageClass is ssd", "faultTolerance=embedded"),
        ({"auth": {"apiKeyEntry": "key", "adminTokenEntry": "key"}}, "are both key", "name two entries"),
        ({"experts": {"labels": {"ray.io/group": "a"}}}, "experts.labels has ray.io/group", "leave it out"),
        (
            {"attention": {"labels": {"app.kubernetes.io/name": "a"}}},
            "attention.labels has app.kubernetes.io/name",
            "leave it out",
        ),
        (
            {"experts": {"gpus": 1, "extraResources": {"nvidia.com/gpu": 2}}},
            "experts.extraResources has nvidia.com/gpu",
            "set experts.gpus",
        ),
        ({"ray": {"version": "2.51.9"}}, "ray.version is 2.51.9", "set ray.tokenAuth=false"),
        ({"ray": {"objectStoreBytes": 2**32}}, "ray.objectStoreBytes is 4294967296", "head.memory is 4Gi"),
        (
            {"ray": {"objectStoreBytes": 2 * 10**9}, "attention": {"memory": "1900M"}},
            "ray.objectStoreBytes is 2000000000 (1.9 GiB)",
            "raise attention.memory",
        ),
        ({"ray": {"objectStoreBytes": 10**9}, "experts": {"memory": "500Mi"}}, "experts.memory is 500Mi", "lower"),
        ({"tls": {"serverName": "shoal"}}, "tls.serverName is shoal", "set tls.secret"),
        (merge(SCALED, {"networkPolicy": {"egressCIDRs": []}}), "networkPolicy.egressCIDRs", "add its addresses"),
        ({"service": {"type": "LoadBalancer"}}, "networkPolicy.clients is empty", "ipBlock"),
        ({"jobs": [{"name": "a-long-job-name", "file": "/a"}], "fullnameOverride": "a" * 30}, "jobs:", "shorten"),
    ],
)
def test_contradictions_are_refused(values: Values, key: str, fix: str) -> None:
    with pytest.raises(helm.HelmRenderError) as refused:
        render(values)
    assert key in str(refused.value)
    assert fix in str(refused.value)


@pytest.mark.parametrize("name", ["1st", "a" * 41 + "-shoal"])
def test_release_names_that_kuberay_refuses_are_refused(name: str) -> None:
    with pytest.raises(helm.HelmRenderError, match="set fullnameOverride"):
        render(name=name)
    render({"fullnameOverride": "fine"}, name=name)


@pytest.mark.parametrize(
    ("change", "enough"),
    [
        ({"memory": "28Gi", "replicas": 2}, "raise experts.memory to 29Gi, or experts.replicas"),  # 53.6 GiB in fp32
        ({"memory": "2Gi", "replicas": 4}, "raise experts.memory to 16Gi"),
        ({"memory": "10G", "replicas": 4}, "or experts.replicas (and experts.minReplicas, if set) to 8"),
        ({"memory": "16Gi", "replicas": 4, "copies": 2}, "raise experts.memory to 29Gi"),
        ({"memory": "29Gi", "replicas": 4, "minReplicas": 1}, "with 1 hosts one holds 53.6 GiB"),
        ({"gpus": 1, "gpuMemory": "24Gi", "replicas": 1}, "raise experts.gpuMemory to 30Gi, or experts.replicas"),
        ({"memory": "6Gi", "replicas": 15}, "with 15 hosts one holds 4.2 GiB of them: raise experts.memory to 7Gi"),
    ],
)
def test_memory_too_small_for_a_nodes_experts_is_refused_with_what_would_do(change: Values, enough: str) -> None:
    with pytest.raises(helm.HelmRenderError) as refused:
        render(merge(SHAPE, {"experts": change}))
    assert enough in str(refused.value)


@pytest.mark.parametrize(
    ("dtype", "experts", "each"),
    [
        ("bfloat16", {"memory": "15Gi", "replicas": 2}, "13.4 GiB"),
        ("float16", {"memory": "28Gi", "replicas": 2}, "26.8 GiB"),
        ("float32", {"memory": "28Gi", "replicas": 2}, "26.8 GiB"),
        ("bfloat16", {"gpus": 1, "gpuMemory": "24Gi", "replicas": 1}, "26.8 GiB"),
        ("float32", {"gpus": 1, "gpuMemory": "48Gi", "replicas": 1}, "53.6 GiB"),
    ],
)
def test_the_weights_dtype_says_what_the_experts_take(dtype: str, experts: Values, each: str) -> None:
    shape: Values = {"model": {"shape": V2_LITE | {"dtype": dtype}}}
    with pytest.raises(helm.HelmRenderError, match=f"one holds {each}"):
        render(merge(shape, {"experts": experts}))
    render(merge(shape, {"experts": experts | {"memory": "29Gi", "gpuMemory": "60Gi" if "gpus" in experts else ""}}))


@pytest.mark.parametrize(
    "change",
    [
        {"memory": "29Gi", "replicas": 2},
        {"memory": "16Gi", "replicas": 4},
        {"memory": "29Gi", "replicas": 4, "copies": 2},
        {"gpus": 1, "gpuMemory": "30Gi", "replicas": 1},
        {"memory": "6Gi", "replicas": 16},
    ],
)
def test_memory_that_does_is_taken(change: Values) -> None:
    render(merge(SHAPE, {"experts": change}))


@pytest.mark.parametrize(
    "values",
    [
        {"experts": {"gpus": 1, "gpuMemory": "", "memory": "2Gi", "replicas": 1}},  # no shape: unchecked
        {"ray": {"version": "2.51.9", "tokenAuth": False}},
        {"ray": {"version": "2.52.0"}},
        {"ray": {"objectStoreBytes": 2**32 - 1}},
        {"model": {"path": "/modelsets/mine"}},
        {"experts": {"replicas": 3, "minReplicas": 2, "copies": 2}},
        {
            "jobs": [{"name": "sft", "file": "/a"}, {"name": "sft", "file": "/b"}, {"name": "dpo", "file": "/a"}],
            "outputs": {"claim": "outputs"},
        },
        {"attention": {"maxLength": 32768, "cacheTokens": 32768}},
        {"experts": {"gpus": 1, "gpuResource": "amd.com/gpu", "extraResources": {"rdma/ib": 1}}},
    ],
)
def test_what_is_just_within_the_bounds_is_taken(values: Values) -> None:
    render(values)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_would_not_fit_into_less_memory(path: Path) -> None:
    values = example(path)
    key = "gpuMemory" if "gpuMemory" in values["experts"] else "memory"
    half: Values = {"experts": {key: "2Gi" if key == "memory" else "16Gi"}}
    with pytest.raises(helm.HelmRenderError, match=f"experts.{key}"):
        render(merge(values, half))


def open_objects(schema: Any, path: str = "") -> Iterator[str]:
    """Where a schema lets unknown keys in."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "additionalProperties" not in schema:
            yield path
        for name, value in schema.items():
            yield from open_objects(value, f"{path}/{name}")


def test_no_key_is_unknown_anywhere_but_in_a_recipe() -> None:
    schema = chart().schema
    assert list(open_objects(schema)) == ["/properties/jobs/items/properties/recipe"]
    assert list(open_objects({"properties": {"a": {"type": "object"}}})) == ["/properties/a"]
