"""Which resources the fake Kubernetes has, and how a client learns of them."""

from tests.helm.fake_store import Object

KUBERNETES = {"major": "1", "minor": "37", "gitVersion": "v1.37.0", "platform": "linux/amd64"}
RESOURCES = {  # kinds by group and version; plurals are regular, or in PLURALS
    "v1": ("ConfigMap", "Namespace", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"),
    "apps/v1": ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet"),
    "batch/v1": ("Job", "CronJob"),
    "networking.k8s.io/v1": ("NetworkPolicy", "Ingress"),
    "policy/v1": ("PodDisruptionBudget",),
    "rbac.authorization.k8s.io/v1": ("Role", "RoleBinding"),
    "ray.io/v1": ("RayCluster", "RayJob", "RayService"),
    "monitoring.coreos.com/v1": ("PodMonitor", "PrometheusRule", "ServiceMonitor"),
    "keda.sh/v1alpha1": ("ScaledObject", "TriggerAuthentication"),
}
PLURALS = {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"}
CLUSTER_WIDE = {"Namespace"}


def plural_of(kind: str) -> str:
    return PLURALS.get(kind, f"{kind.lower()}s")


def resource_of(api_version: str, kind: str) -> str:
    """`rayclusters.ray.io`, `pods`."""
    group = api_version.rpartition("/")[0]
    return f"{plural_of(kind)}.{group}" if group else plural_of(kind)


def discovery(path: str) -> Object | None:
    """Answers to what a client asks to learn which resources there are; None for any other path."""
    if path == "/version":
        return KUBERNETES
    if path == "/api":
        return {"kind": "APIVersions", "apiVersion": "v1", "versions": ["v1"]}
    if path == "/apis":
        groups = []
        for api_version in RESOURCES:
            if "/" in api_version:
                group, _, version = api_version.partition("/")
                entry = {"groupVersion": api_version, "version": version}
                groups.append({"name": group, "versions": [entry], "preferredVersion": entry})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        paths = {_root(each): {"serverRelativeURL": f"/openapi/v3/{_root(each)}"} for each in RESOURCES}
        return {"paths": paths}
    if path.startswith("/openapi/v3/"):
        return _openapi(path.removeprefix("/openapi/v3/"))
    api_version = path.removeprefix("/apis/") if path.startswith("/apis/") else path.removeprefix("/api/")
    if api_version not in RESOURCES:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {
            "name": plural_of(kind),
            "singularName": kind.lower(),
            "namespaced": kind not in CLUSTER_WIDE,
            "kind": kind,
            "verbs": verbs,
        }
        for kind in RESOURCES[api_version]
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": resources}


def _root(api_version: str) -> str:
    return f"apis/{api_version}" if "/" in api_version else f"api/{api_version}"


def _openapi(root: str) -> Object:
    """No schemas, only this: the server validates fields, so the client need not."""
    api_version = root.partition("/")[2]
    group, _, version = api_version.rpartition("/")
    paths = {}
    for kind in RESOURCES[api_version]:
        place = "" if kind in CLUSTER_WIDE else "namespaces/{namespace}/"
        about = {"group": group, "version": version, "kind": kind}
        patch = {"parameters": [{"name": "fieldValidation", "in": "query"}], "x-kubernetes-group-version-kind": about}
        paths[f"/{root}/{place}{plural_of(kind)}/{{name}}"] = {"patch": patch | {"responses": {}}}
    return {"openapi": "3.0.0", "info": {"title": "fake", "version": "v1"}, "paths": paths}
