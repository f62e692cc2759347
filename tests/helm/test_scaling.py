"""More and fewer nodes, and who decides about them."""

import json
import shlex

import pytest

from services.cli import parser
from tests.helm.charts import Values, container, environment, find, groups, merge, pods, render, serve_config
from tests.helm.fake_store import Object

SCALED_BY_KUBERAY: Values = {
    "autoscaling": {"enabled": True},
    "experts": {"replicas": None, "minReplicas": 2, "maxReplicas": 6},
    "networkPolicy": {"egressCIDRs": ["10.0.0.0/8"]},
}
SCALED_BY_KEDA: Values = {"keda": {"enabled": True, "maxExtra": 3}, "monitoring": {"podMonitor": True}}


def cluster(values: Values | None = None) -> Object:
    return find(render(values), "RayCluster")


def test_replicas_change_one_number_of_the_cluster_and_nothing_of_the_application() -> None:
    two, four = render({"experts": {"replicas": 2}}), render({"experts": {"replicas": 4}})
    changed = {each["metadata"]["name"] for each, other in zip(two, four, strict=True) if each != other}
    assert changed == {"demo-shoal", "demo-shoal-drain", "demo-shoal-experts"}  # cluster, hook, disruption budget
    fewer, more = find(two, "RayCluster"), find(four, "RayCluster")
    assert groups(fewer)["experts"]["replicas"] == 2
    groups(fewer)["experts"]["replicas"] = 4
    assert fewer == more


def test_kuberay_scales_between_bounds_and_hosts_ask_for_nodes() -> None:
    objects = render(SCALED_BY_KUBERAY)
    made = find(objects, "RayCluster")
    experts = groups(made)["experts"]
    assert "replicas" not in experts
    assert (experts["minReplicas"], experts["maxReplicas"]) == (2, 6)
    assert made["spec"]["enableInTreeAutoscaling"]
    arguments = serve_config(objects)["applications"][0]["args"]["experts"]
    assert (arguments["hosts"], arguments["resources"]) == (2, {"shoal_expert": 1})
    assert "node_resource" not in arguments
    assert "demo-shoal-drain" not in [each["metadata"]["name"] for each in objects]
    tokens = [pod["spec"]["automountServiceAccountToken"] for pod in pods(objects)]
    assert tokens.count(True) == 1  # the head's, for the autoscaler


def test_without_it_hosts_follow_nodes() -> None:
    arguments = serve_config(render())["applications"][0]["args"]["experts"]
    assert arguments["node_resource"] == "shoal_expert"
    assert "resources" not in arguments


def test_keda_counts_pods_that_join_as_expert_nodes() -> None:
    objects = render(SCALED_BY_KEDA)
    extra, scaled = find(objects, "Deployment"), find(objects, "ScaledObject")
    assert "replicas" not in extra["spec"]
    assert scaled["spec"]["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": extra["metadata"]["name"],
    }
    assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == (0, 3)
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["metadata"]["query"] == 'sum(shoal_num_requests_waiting{shoal="demo-shoal"})'
    (start,) = container(extra["spec"]["template"])["args"]
    given = dict(word.split("=", 1) for word in shlex.split(start) if word.startswith("--") and "=" in word)
    assert json.loads(given["--resources"]) == {"shoal_expert": 1}
    assert given["--address"] == "demo-shoal-head-svc.prod:6379"
    assert given["--num-cpus"] == "0"
    expert = groups(find(objects, "RayCluster"))["experts"]["template"]
    for name in ("resources", "lifecycle", "securityContext"):
        assert container(extra["spec"]["template"])[name] == container(expert)[name]
    assert not [label for label in extra["spec"]["template"]["metadata"]["labels"] if label.startswith("ray.io/")]


def test_nodes_that_keda_counts_have_the_labels_of_the_others() -> None:
    objects = render(merge(SCALED_BY_KEDA, {"experts": {"labels": {"team": "b", "zone": "1"}}}))
    (start,) = container(find(objects, "Deployment")["spec"]["template"])["args"]
    (labels,) = (word.removeprefix("--labels=") for word in shlex.split(start) if word.startswith("--labels="))
    given = dict(label.split("=") for label in labels.split(","))
    assert given == groups(find(objects, "RayCluster"))["experts"]["labels"]


def test_pods_that_keda_counts_have_what_kuberay_gives_its_own() -> None:
    node = find(render(SCALED_BY_KEDA), "Deployment")["spec"]["template"]
    assert {"name": "shared-mem", "mountPath": "/dev/shm"} in container(node)["volumeMounts"]
    assert {"name": "shared-mem", "emptyDir": {"medium": "Memory"}} in node["spec"]["volumes"]
    for own in pods([find(render(SCALED_BY_KEDA), "RayCluster")]):
        assert "shared-mem" not in json.dumps(own)


@pytest.mark.parametrize(
    ("kept", "waits"), [("none", None), ("embedded", {"value": "600"}), ("redis", {"value": "600"})]
)
def test_pods_that_keda_counts_wait_for_a_head_that_comes_back(kept: str, waits: Object | None) -> None:
    gcs = {"faultTolerance": kept, "redisAddress": "redis:6379" if kept == "redis" else ""}
    reach: Values = {"ray": {"gcs": gcs}, "networkPolicy": {"egressCIDRs": ["10.0.0.0/8"]}}
    objects = render(SCALED_BY_KEDA | reach)
    extra = container(find(objects, "Deployment")["spec"]["template"])
    assert environment(extra).get("RAY_gcs_rpc_server_reconnect_timeout_s") == waits
    assert "reconnect_timeout" not in json.dumps(find(objects, "RayCluster"))


def test_stopping_pods_have_the_time_that_their_drain_takes() -> None:
    made = groups(cluster({"experts": {"drainSeconds": 100}, "attention": {"drainSeconds": 20}}))
    experts, attention = made["experts"]["template"], made["attention"]["template"]
    assert experts["spec"]["terminationGracePeriodSeconds"] > 100
    assert attention["spec"]["terminationGracePeriodSeconds"] > 20
    stop = container(experts)["lifecycle"]["preStop"]["exec"]["command"]
    assert shlex.split(stop[-1])[:5] == ["shoal", "experts", "drain", "--node", "$POD_IP"]
    assert "--timeout 100" in stop[-1]
    assert "sleep 20" in container(attention)["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert environment(container(experts))["POD_IP"] == {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}


def test_the_drain_hook_comes_before_a_change_and_the_deployment_after_it() -> None:
    objects = render({"experts": {"replicas": 3, "drainSeconds": 200}, "serve": {"deploySeconds": 900}})
    drain, deploy = find(objects, "Job", "-drain"), find(objects, "Job", "-deploy")
    assert drain["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade,pre-rollback"
    assert deploy["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade,post-rollback"
    assert drain["spec"]["activeDeadlineSeconds"] > 200
    assert deploy["spec"]["activeDeadlineSeconds"] == 900
    (script,) = container(drain["spec"]["template"])["args"]
    assert script.strip() == "shoal experts drain --to 3 --if-running --wait --timeout 200"


@pytest.mark.parametrize("ending", ["-drain", "-experts"])
def test_the_command_line_takes_what_the_chart_calls(ending: str) -> None:
    objects = render()
    if ending == "-drain":
        (line,) = container(find(objects, "Job", "-drain")["spec"]["template"])["args"]
    else:
        stop = container(groups(find(objects, "RayCluster"))["experts"]["template"])["lifecycle"]["preStop"]
        line = stop["exec"]["command"][-1]
    _, *arguments = shlex.split(line)
    options = parser().parse_args(arguments)
    assert options.if_running
    assert options.wait
    assert (options.to, options.node) in ((2, None), (None, "$POD_IP"))
