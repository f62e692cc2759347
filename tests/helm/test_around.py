"""What stands around the cluster: budgets, network policy, monitoring, notes."""

import json
import re

from tests.helm.charts import Values, container, find, kinds, merge, notes, pods, render

SCALED_BY_KUBERAY: Values = {
    "autoscaling": {"enabled": True},
    "experts": {"replicas": None, "minReplicas": 2, "maxReplicas": 6},
    "networkPolicy": {"egressCIDRs": ["10.0.0.0/8"]},
}
MONITORED: Values = {"monitoring": {"podMonitor": True, "rules": True, "dashboard": True}}


def test_disruption_budgets_are_whole_numbers_below_the_pods() -> None:
    objects = render({"experts": {"replicas": 5}, "attention": {"replicas": 2}})
    assert find(objects, "PodDisruptionBudget", "-experts")["spec"]["minAvailable"] == 4
    assert find(objects, "PodDisruptionBudget", "-attention")["spec"]["minAvailable"] == 1
    assert find(render(SCALED_BY_KUBERAY), "PodDisruptionBudget", "-experts")["spec"]["minAvailable"] == 1
    assert "PodDisruptionBudget" not in kinds(render({"experts": {"replicas": 1}}))
    assert "PodDisruptionBudget" not in kinds(render({"podDisruptionBudget": {"enabled": False}}))


def test_the_network_is_closed_but_for_what_was_named() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"team": "a"}}}
    policy = {
        "clients": [peer],
        "operatorNamespace": "ray",
        "monitoringNamespace": "prom",
        "egressCIDRs": ["1.2.3.0/24"],
    }
    spec = find(render({"networkPolicy": policy}), "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    ours, clients, operator, prometheus = spec["ingress"]
    assert "ports" not in ours
    assert ours["from"] == [{"podSelector": spec["podSelector"]}]
    assert clients == {"from": [peer], "ports": [{"port": 8000}]}
    assert operator["ports"] == [{"port": 8265}]
    assert operator["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "ray"}
    assert prometheus["ports"] == [{"port": 8000}, {"port": 8080}]
    assert spec["egress"][0]["to"] == [{"podSelector": spec["podSelector"]}]
    assert spec["egress"][-1] == {"to": [{"ipBlock": {"cidr": "1.2.3.0/24"}}]}
    assert "NetworkPolicy" not in kinds(render({"networkPolicy": {"enabled": False}}))


def test_prometheus_asks_one_proxy_with_the_key_and_every_ray_node() -> None:
    monitor = find(render(MONITORED), "PodMonitor")
    ours, rays = monitor["spec"]["podMetricsEndpoints"]
    assert (ours["port"], ours["path"], rays["port"]) == ("serve", "/metrics", "metrics")
    assert ours["authorization"] == {"credentials": {"name": "shoal-auth", "key": "api-key"}}
    assert ours["relabelings"][0]["action"] == "keep"
    assert ours["relabelings"][0]["regex"] == "head"
    for endpoint in (ours, rays):
        assert endpoint["relabelings"][-1] == {"targetLabel": "shoal", "replacement": "demo-shoal"}
    for node in pods([find(render(MONITORED), "RayCluster")]):
        assert "metrics" in {port["name"] for port in container(node)["ports"]}


def test_rules_and_dashboard_carry_the_labels_that_are_selected_by() -> None:
    objects = render(merge(MONITORED, {"monitoring": {"labels": {"release": "prom"}}}))
    for kind, ending in (("PodMonitor", ""), ("PrometheusRule", ""), ("ConfigMap", "-dashboard")):
        assert find(objects, kind, ending)["metadata"]["labels"]["release"] == "prom"
    assert find(objects, "ConfigMap", "-dashboard")["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = json.loads(find(objects, "ConfigMap", "-dashboard")["data"]["shoal.json"])
    assert len(dashboard["panels"]) > 10
    (group,) = find(objects, "PrometheusRule")["spec"]["groups"]
    assert all('shoal="demo-shoal"' in rule["expr"] for rule in group["rules"])
    assert kinds(render()).isdisjoint({"PodMonitor", "PrometheusRule"})


def test_a_change_is_stuck_only_after_half_an_hour_of_it() -> None:
    """One sample says nothing yet: a Prometheus that has just started has no more."""
    (group,) = find(render(MONITORED), "PrometheusRule")["spec"]["groups"]
    (stuck,) = (rule for rule in group["rules"] if rule["alert"] == "ShoalChangeStuck")
    assert (stuck["expr"], stuck["for"]) == ('shoal_change_in_progress{shoal="demo-shoal"} == 1', "30m")


def test_the_dashboard_adds_up_what_each_ingress_counts_for_itself() -> None:
    """A scrape reaches one ingress: the others' counts are as they were when they were last reached."""
    dashboard = json.loads(find(render(MONITORED), "ConfigMap", "-dashboard")["data"]["shoal.json"])
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    own = [query for query in shown if re.search("shoal_(requests_in_flight|replays_total)", query)]
    assert own == [
        'sum(last_over_time(shoal_requests_in_flight{shoal="$shoal"}[2m]))',
        '60 * sum(rate(shoal_replays_total{shoal="$shoal"}[5m]))',
    ]


def test_notes_say_how_to_talk_to_it() -> None:
    text = notes({"service": {"port": 80}, "model": {"servedName": "tide"}, "auth": {"existingSecret": "keys"}})
    assert "kubectl --namespace prod port-forward service/demo-shoal 8000:80 &" in text
    assert "get secret keys" in text
    assert """{{index .data "api-key" | base64decode}}""" in text
    (curl,) = re.findall(r"curl .*?\n.*?-d '(.*?)'", text, re.DOTALL)
    assert json.loads(curl)["model"] == "tide"
    assert "helm test demo --namespace prod" in text
    assert "--timeout 45m --set experts.replicas=3" in text
    slow = notes({"serve": {"deploySeconds": 3600}, "experts": {"drainSeconds": 1200}})
    assert "--timeout 85m" in slow  # for both hooks, and what is between them
    assert "faultTolerance=embedded" in text
    kept = notes(merge(SCALED_BY_KUBERAY, {"ray": {"gcs": {"faultTolerance": "embedded"}}}))
    assert "shoal experts scale 3 --wait" in kept
    assert "faultTolerance" not in kept


def test_helms_test_asks_for_one_completion_in_python_that_compiles() -> None:
    pod = find(render({"model": {"servedName": "tide"}}), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert container(pod)["command"] == ["python", "-c"]
    (script,) = container(pod)["args"]
    compile(script, "completion", "exec")
    assert '"model": "tide"' in script
    assert "/v1/completions" in script


def test_names_follow_the_release() -> None:
    assert find(render(name="shoal"), "RayCluster")["metadata"]["name"] == "shoal"
    assert find(render(name="a"), "RayCluster")["metadata"]["name"] == "a-shoal"
    assert find(render({"fullnameOverride": "b"}), "RayCluster")["metadata"]["name"] == "b"
