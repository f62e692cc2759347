"""What the values make of the RayCluster: its nodes, their model, keys and files."""

import json
import os

import pytest

from cluster.session import keep_private
from tests.helm.charts import CHART, Values, container, environment, find, groups, merge, pods, render, serve_config
from tests.helm.fake_store import Object


def cluster(values: Values | None = None) -> Object:
    return find(render(values), "RayCluster")


def test_an_expert_node_has_a_resource_and_labels_that_name_it() -> None:
    experts = groups(cluster({"experts": {"labels": {"team": "a"}}}))["experts"]
    assert experts["resources"] == {"CPU": "0", "shoal_expert": "1"}
    assert experts["labels"] == {"shoal/role": "experts", "team": "a"}
    assert experts["template"]["metadata"]["labels"]["team"] == "a"
    assert experts["rayStartParams"].keys() == {"object-store-memory"}  # KubeRay refuses resources in both places


def test_cpus_are_on_attention_nodes_alone() -> None:
    made = cluster()
    assert made["spec"]["headGroupSpec"]["resources"] == {"CPU": "0"}
    assert "resources" not in groups(made)["attention"]


def test_gpus_reach_the_pods_and_the_application() -> None:
    objects = render({"experts": {"gpus": 1, "gpuResource": "amd.com/gpu"}, "attention": {"gpus": 1}})
    made = groups(find(objects, "RayCluster"))
    limits = {name: container(group["template"])["resources"]["limits"] for name, group in made.items()}
    assert limits["experts"] == {"cpu": "2", "memory": "4Gi", "amd.com/gpu": "1"}
    assert limits["attention"] == {"cpu": "2", "memory": "4Gi", "nvidia.com/gpu": "1"}
    arguments = serve_config(objects)["applications"][0]["args"]
    assert (arguments["experts"]["gpus"], arguments["attention"]["gpus"]) == (1, 1)


@pytest.mark.parametrize(
    ("values", "tag"),
    [
        ({}, "0.1.0"),
        ({"attention": {"gpus": 1}}, "0.1.0-gpu"),
        ({"experts": {"gpus": 1}}, "0.1.0-gpu"),
        ({"experts": {"gpus": 1}, "image": {"tag": "mine"}}, "mine"),
    ],
)
def test_gpus_take_the_image_that_is_built_for_them(values: Values, tag: str) -> None:
    objects = render(values)
    assert {container(pod)["image"] for pod in pods(objects)} == {f"shoal:{tag}"}
    dockerfile = (CHART.parents[1] / "Dockerfile").read_text()
    assert tag == "mine" or f" -t shoal:{tag} ." in dockerfile


def test_nodes_have_what_a_ray_of_our_own_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    keep_private()
    given = {name: {"value": value} for name, value in os.environ.items() if name.startswith("RAY_")}
    assert "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S" in given
    for pod in pods([cluster()]):
        assert given.items() <= environment(container(pod)).items()


def test_placement_is_of_its_group() -> None:
    toleration = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    made = groups(cluster({"experts": {"nodeSelector": {"pool": "gpu"}, "tolerations": [toleration]}}))
    assert made["experts"]["template"]["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert made["experts"]["template"]["spec"]["tolerations"] == [toleration]
    assert "nodeSelector" not in made["attention"]["template"]["spec"]


@pytest.mark.parametrize(
    ("values", "volume"),
    [
        ({"source": "pvc", "pvc": {"claim": "m"}}, {"persistentVolumeClaim": {"claimName": "m", "readOnly": True}}),
        (
            {"source": "image", "image": {"reference": "r/m:1"}},
            {"image": {"reference": "r/m:1", "pullPolicy": "Always"}},
        ),
        ({"source": "objectStore", "objectStore": {"url": "s3:m"}}, {"emptyDir": {"sizeLimit": "60Gi"}}),
    ],
)
def test_the_model_is_mounted_into_every_node(values: Values, volume: Object) -> None:
    common: Values = {"image": {"pullPolicy": "Always"}, "networkPolicy": {"egressCIDRs": ["0.0.0.0/0"]}}
    objects = render(merge(common, {"model": {"path": "/models/lite"} | values}))
    nodes = list(pods([find(objects, "RayCluster")]))
    assert len(nodes) == 3
    for node in nodes:
        assert {"name": "model"} | volume in node["spec"]["volumes"]
        assert {"name": "model", "mountPath": "/models", "readOnly": True} in container(node)["volumeMounts"]
    assert serve_config(objects)["applications"][0]["args"]["model"] == "/models/lite"


def test_an_object_store_is_copied_before_the_node_starts() -> None:
    store = {"url": "s3://b/lite", "command": ["aws", "s3", "sync"], "image": "amazon/aws-cli:2", "secret": "s3"}
    model: Values = {"source": "objectStore", "path": "/models/lite", "objectStore": store}
    made = cluster({"model": model, "networkPolicy": {"egressCIDRs": ["0.0.0.0/0"]}})
    (fetch,) = groups(made)["experts"]["template"]["spec"]["initContainers"]
    assert fetch["command"] == ["aws", "s3", "sync", "s3://b/lite", "/models/lite"]
    assert fetch["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert {"name": "model", "mountPath": "/models"} in fetch["volumeMounts"]


def test_a_copy_takes_bounded_resources_and_a_node_with_room_for_it() -> None:
    store = {"url": "s3:m", "size": "40Gi", "cpu": 3, "memory": "2Gi"}
    model: Values = {"source": "objectStore", "path": "/models/lite", "objectStore": store}
    made = cluster({"model": model, "networkPolicy": {"egressCIDRs": ["0.0.0.0/0"]}})
    for node in pods([made]):
        (fetch,) = node["spec"]["initContainers"]
        bounds = {"cpu": 3, "memory": "2Gi"}
        # a limit of storage would hold for the pod, while only the copy's volume has this size
        assert fetch["resources"] == {"requests": bounds | {"ephemeral-storage": "40Gi"}, "limits": bounds}


@pytest.mark.parametrize(
    ("gcs", "options"),
    [
        ({"faultTolerance": "none"}, None),
        (
            {"faultTolerance": "embedded", "size": "20Gi", "storageClass": "ssd", "deletionPolicy": "Retain"},
            {
                "backend": "rocksdb",
                "storage": {"size": "20Gi", "storageClassName": "ssd", "deletionPolicy": "Retain"},
            },
        ),
        (
            {"faultTolerance": "redis", "redisAddress": "redis:6379", "redisSecret": "r"},
            {
                "redisAddress": "redis:6379",
                "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "r", "key": "password"}}},
            },
        ),
    ],
)
def test_the_cluster_survives_its_head_by_what_was_chosen(gcs: Values, options: Object | None) -> None:
    made = cluster({"ray": {"gcs": gcs}, "networkPolicy": {"egressCIDRs": ["10.0.0.0/8"]}})
    assert made["spec"].get("gcsFaultToleranceOptions") == options


def test_rays_token_is_with_kuberay_and_with_who_calls_ray() -> None:
    objects = render({"jobs": [{"name": "sft", "file": "/a.yaml"}], "outputs": {"claim": "outputs"}})
    assert find(objects, "RayCluster")["spec"]["authOptions"] == {"mode": "token"}
    wanted = {"valueFrom": {"secretKeyRef": {"name": "demo-shoal", "key": "auth_token"}}}
    deploy = container(find(objects, "Job", "-deploy")["spec"]["template"])
    submit = container(find(objects, "RayJob")["spec"]["submitterPodTemplate"])
    assert environment(deploy)["RAY_AUTH_TOKEN"] == environment(submit)["RAY_AUTH_TOKEN"] == wanted
    own = render({"ray": {"tokenSecret": "mine"}})
    assert find(own, "RayCluster")["spec"]["authOptions"] == {"mode": "token", "secretName": "mine"}
    assert "RAY_AUTH" not in json.dumps(render({"ray": {"tokenAuth": False}}))


def test_keys_come_from_the_secret_and_go_only_where_they_are_needed() -> None:
    auth = {"existingSecret": "keys", "apiKeyEntry": "client", "adminTokenEntry": "admin"}
    objects = render({"auth": auth})
    api = {"valueFrom": {"secretKeyRef": {"name": "keys", "key": "client"}}}
    admin = {"valueFrom": {"secretKeyRef": {"name": "keys", "key": "admin"}}}
    held = {}
    for pod in pods(objects):
        known = environment(container(pod))
        held[container(pod)["name"], pod["metadata"]["labels"]["app.kubernetes.io/component"]] = (
            known.get("SHOAL_API_KEY"),
            known.get("SHOAL_ADMIN_TOKEN"),
        )
    assert held == {
        ("ray-head", "head"): (api, admin),
        ("ray-worker", "attention"): (api, admin),
        ("ray-worker", "experts"): (api, admin),
        ("deploy", "hook"): (None, None),
        ("drain", "hook"): (None, admin),
        ("complete", "test"): (api, None),
    }
    assert "keys" not in json.dumps(serve_config(objects))


def test_tls_files_are_mounted_and_named_to_the_application() -> None:
    objects = render({"tls": {"secret": "pem", "serverName": "shoal"}})
    assert serve_config(objects)["applications"][0]["args"]["tls"] == {
        "certificate": "/etc/shoal/tls/tls.crt",
        "key": "/etc/shoal/tls/tls.key",
        "root": "/etc/shoal/tls/ca.crt",
        "name": "shoal",
    }
    for node in pods([find(objects, "RayCluster")]):
        assert {"name": "tls", "mountPath": "/etc/shoal/tls", "readOnly": True} in container(node)["volumeMounts"]
        assert {"name": "tls", "secret": {"secretName": "pem", "defaultMode": 0o440}} in node["spec"]["volumes"]
    assert "tlsOptions" not in cluster()["spec"]
    assert cluster({"tls": {"ray": True}})["spec"]["tlsOptions"] == {"enabled": True}
