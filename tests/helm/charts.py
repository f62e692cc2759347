"""The chart as Helm's own engine renders it, and what every object of it is checked against."""

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource

from tests.helm.fake_store import Object

CHART = Path(__file__).parents[2] / "helm" / "shoal"
JOB = CHART.parent / "examples" / "job.yaml"  # over the values of a service
EXAMPLES = sorted({*JOB.parent.glob("*.yaml")} - {JOB})
CRDS = Path(__file__).parent / "crds"
NEWEST, OLDEST = "1.37", "1.29"  # of Kubernetes
Values = dict[str, Any]


@functools.cache
def chart() -> helm.Chart:
    return helm.Chart.load(CHART)


def render(values: Values | None = None, name: str = "demo", namespace: str = "prod") -> list[Object]:
    """Every object, hooks and tests too; raises HelmError when the values are refused."""
    files = chart().render(values or {}, name=name, namespace=namespace)
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return [json.loads(each) for text in texts for each in _parse(text)]


@functools.cache
def _parse(text: str) -> list[str]:
    """Each document as JSON: Helm's YAML is read once, however many features leave it as it is."""
    return [json.dumps(each) for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each]


def notes(values: Values | None = None) -> str:
    return chart().render(values or {}, name="demo", namespace="prod")["shoal/templates/NOTES.txt"]


def example(path: Path) -> Values:
    return helm.values_from_yaml(path.read_text())


def merge(*all_values: Values) -> Values:
    """Values over values, as with several `--values`."""
    merged: Values = {}
    for values in all_values:
        for name, value in values.items():
            both = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = merge(merged[name], value) if both else copy.deepcopy(value)
    return merged


def find(objects: list[Object], kind: str, ending: str = "") -> Object:
    """The one object of a kind whose name ends so; an AssertionError when it is not one."""
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, [each["metadata"]["name"] for each in found]
    return found[0]


def kinds(objects: list[Object]) -> set[str]:
    return {each["kind"] for each in objects}


def groups(cluster: Object) -> dict[str, Object]:
    """Worker groups of a RayCluster by name."""
    return {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}


def serve_config(objects: list[Object]) -> Object:
    config: Object = yaml.safe_load(find(objects, "ConfigMap", "-serve")["data"]["serve.yaml"])
    return config


def pods(objects: list[Object]) -> Iterator[Object]:
    """Every pod that these objects lead to: {"metadata", "spec"}."""
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Pod":
            yield each
        elif each["kind"] in ("Job", "Deployment"):
            yield spec["template"]
        elif each["kind"] == "RayCluster":
            yield from (group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
        elif each["kind"] == "RayJob":
            yield spec["submitterPodTemplate"]


def container(pod: Object) -> Object:
    only: Object
    (only,) = pod["spec"]["containers"]
    return only


def environment(of: Object) -> dict[str, Object]:
    """A container's variables by name: how each gets its value."""
    return {each["name"]: {name: value for name, value in each.items() if name != "name"} for each in of["env"]}


def check_schema(each: Object, version: str = NEWEST) -> None:
    """Raises jsonschema's ValidationError; kinds of other projects than KubeRay have no schema here."""
    _check_schema(json.dumps(each), version)


@functools.cache
def _check_schema(text: str, version: str) -> None:
    """Cached: features change few objects, and Kubernetes' schemas are large."""
    each = json.loads(text)
    group = each["apiVersion"].rpartition("/")[0]
    if group == "ray.io":
        _ray_schema(each["kind"]).validate(each)
    elif group not in ("monitoring.coreos.com", "keda.sh"):
        _kubernetes_schema(each["apiVersion"], each["kind"], version).validate(each)


@functools.cache
def _kubernetes_schema(api_version: str, kind: str, version: str) -> jsonschema.Draft202012Validator:
    """What `kubernetes_validate.validate(..., strict=True)` reads anew for each object."""
    group, _, of_group = api_version.rpartition("/")
    name = f"{kind}-{group.partition('.')[0]}-{of_group}" if group else f"{kind}-{of_group}"
    schema = json.loads((_kubernetes(version) / f"{name.lower()}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(version))


@functools.cache
def _definitions(version: str) -> Registry[Any]:
    return Resource.from_contents(json.loads((_kubernetes(version) / "_definitions.json").read_text())) @ Registry()


def _kubernetes(version: str) -> Path:
    return Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{version}.0-local-strict"


@functools.cache
def _ray_schema(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((CRDS / f"ray.io_{kind.lower()}s.json").read_text())
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """As the API server checks: fields that the schema does not have are refused."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(value) for name, value in schema.items()}
    open_ = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_:
        strict["additionalProperties"] = False
    return strict
