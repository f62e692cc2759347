"""Jobs: what becomes of a recipe, and that the example fits the service that it is for."""

import re
import shlex

import helm_python as helm
import pytest
import yaml

from model.config import parse_config
from services.train_command import STOP_S
from services.training.forecast import forecast
from services.training.recipe import Recipe, parse_recipe
from tests.helm.charts import (
    EXAMPLES,
    JOB,
    Values,
    check_schema,
    container,
    example,
    find,
    groups,
    merge,
    pods,
    render,
    serve_config,
)
from tests.model.shapes import V2_LITE

CLAIM: Values = {"outputs": {"claim": "outputs"}}
GIB = 2**30
SERVICE = merge(
    *(example(path) for path in EXAMPLES if path.stem == "v2-lite-cpu"),
    CLAIM | {"experts": {"memory": "48Gi"}},
)


def job(recipe: Values, *args: str) -> Values:
    return CLAIM | {"jobs": [{"name": "sft", "recipe": recipe, "args": list(args)}]}


def test_a_recipe_becomes_a_ray_job_that_finds_it() -> None:
    recipe = {"output_dir": "/outputs/a", "steps": 10}
    objects = render(job(recipe, "optimizer.lr=1e-5", "seed=1"))
    made = find(objects, "RayJob")
    assert made["spec"]["clusterSelector"] == {"ray.io/cluster": find(objects, "RayCluster")["metadata"]["name"]}
    shell, flag, script = shlex.split(made["spec"]["entrypoint"])
    assert (shell, flag) == ("bash", "-c")
    waits, runs = script.split("; exec ")
    python, module, name, path, *arguments = shlex.split(runs)
    assert (python, module, name) == ("python", "-m", "services.train")
    assert arguments == ["optimizer.lr=1e-5", "seed=1"]
    assert waits == f"until [ -e {path} ]; do sleep 1; done"
    files = find(objects, "ConfigMap", "-recipes")["data"]
    assert yaml.safe_load(files[path.removeprefix("/etc/shoal/recipes/")]) == recipe
    for node in pods([find(objects, "RayCluster")]):
        assert {"name": "recipes", "mountPath": "/etc/shoal/recipes", "readOnly": True} in container(node)[
            "volumeMounts"
        ]


def test_a_file_is_one_word_to_the_shell() -> None:
    values = CLAIM | {"jobs": [{"name": "sft", "file": "/outputs/a&b;c.yaml", "args": ["seed=1"]}]}
    entry = shlex.shlex(find(render(values), "RayJob")["spec"]["entrypoint"], posix=True, punctuation_chars=True)
    assert [*entry] == ["python", "-m", "services.train", "/outputs/a&b;c.yaml", "seed=1"]


def test_a_changed_job_is_another_one_and_an_unchanged_one_the_same() -> None:
    def names(*jobs: Values) -> list[str]:
        return [each["metadata"]["name"] for each in render(CLAIM | {"jobs": list(jobs)}) if each["kind"] == "RayJob"]

    first: Values = {"name": "sft", "recipe": {"output_dir": "/outputs/a", "steps": 10}}
    (name,) = names(first)
    assert names(first, {"name": "other", "file": "/outputs/r.yaml"})[0] == name
    assert names(first | {"recipe": {"output_dir": "/outputs/a", "steps": 11}}) != [name]
    assert names(first | {"args": ["seed=2"]}) != [name]


def test_a_job_that_is_deleted_has_as_long_for_its_snapshot_as_one_that_the_command_sent() -> None:
    made = find(render(job({"output_dir": "/outputs/a"})), "RayJob")
    variables = yaml.safe_load(made["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables == {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}


def test_nothing_runs_a_job_again() -> None:
    spec = find(render(job({"output_dir": "/outputs/a"})), "RayJob")["spec"]
    assert "backoffLimit" not in spec  # of KubeRay, which has none by default, and none for a cluster that is there
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def test_the_readme_names_the_files_that_the_services_calls_are_guarded_by() -> None:
    said = (JOB.parents[1] / "shoal" / "README.md").read_text()
    (named,) = re.findall(r"`tls: (\{certificate: .*\})` under `experts`", said)
    (application,) = serve_config(render({"tls": {"secret": "pem"}}))["applications"]
    assert yaml.safe_load(named) == application["args"]["tls"]
    recipe = {"output_dir": "o", "model": "m", "data": {"files": ["d.jsonl"]}, "steps": 1}
    assert parse_recipe(recipe | {"experts": {"tls": yaml.safe_load(named)}}).experts.tls is not None


@pytest.mark.parametrize(
    ("values", "key", "fix"),
    [
        ({"jobs": [{"name": "sft", "file": "/a"}]}, "outputs.claim is empty", "set outputs.claim"),
        (job({"output_dir": "runs/a"}), "recipe.output_dir of sft is runs/a", "such as /outputs/sft"),
        (job({"output_dir": "/outputs"}), "recipe.output_dir of sft is /outputs", "such as /outputs/sft"),
        (job({"output_dir": "/outputs/../tmp/a"}), "recipe.output_dir of sft is /outputs/../tmp/a", "/outputs/sft"),
        (job({"steps": 1}, "seed=1"), "recipe.output_dir of sft is not given", "such as /outputs/sft"),
    ],
)
def test_results_that_the_pods_would_not_share_are_refused(values: Values, key: str, fix: str) -> None:
    with pytest.raises(helm.HelmRenderError) as refused:
        render(values)
    assert key in str(refused.value)
    assert fix in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        job({"output_dir": "/outputs/a"}),
        job({"output_dir": "runs/a"}, "seed=1", "output_dir=/tmp/a"),
    ],
)
def test_results_below_the_claim_or_where_the_arguments_say_are_taken(values: Values) -> None:
    render(values)


def recipe() -> Recipe:
    """Of the example."""
    (only,) = example(JOB)["jobs"]
    return parse_recipe(only["recipe"])


def test_the_example_is_a_job_of_its_service_with_paths_that_the_pods_share() -> None:
    objects = render(merge(SERVICE, example(JOB)))
    check_schema(find(objects, "RayJob"))
    (application,) = serve_config(objects)["applications"]
    assert (str(recipe().model), recipe().experts.service) == (application["args"]["model"], application["name"])
    assert recipe().output_dir.is_relative_to("/outputs")
    assert all(file.is_relative_to("/outputs") for file in recipe().data.files)
    mounts = container(groups(find(objects, "RayCluster"))["attention"]["template"])["volumeMounts"]
    assert {"/models", "/outputs"} <= {mount["mountPath"] for mount in mounts}


def test_the_example_fits_beside_serving() -> None:
    needs = forecast(recipe(), parse_config(V2_LITE))
    experts, attention = SERVICE["experts"], SERVICE["attention"]
    assert recipe().experts.hosts <= experts["replicas"]
    serving = 2 * needs.experts / experts["replicas"]  # bytes, in bfloat16
    assert serving + needs.host_bytes + needs.host_activation_bytes + 2 * GIB < memory(experts)
    serving = 2 * needs.dense + 7.6 * GIB  # with the cache
    assert serving + needs.worker_bytes + needs.activation_bytes + 4 * GIB < memory(attention)
    assert recipe().workers.cpus <= attention["cpu"] - 0.5 - 2 * 0.01  # that worker, controller and ingress reserve


def test_the_readme_runs_the_example() -> None:
    said = (JOB.parents[1] / "shoal" / "README.md").read_text().partition("## Training\n")[2].partition("\n## ")[0]
    install, upgrade = (line for line in said.splitlines() if line.startswith("$ helm"))
    assert "--values helm/examples/v2-lite-cpu.yaml --set outputs.claim=outputs,experts.memory=48Gi" in install
    assert f"--reset-then-reuse-values --values helm/examples/{JOB.name}" in upgrade
    assert "48Gi" in JOB.read_text()


def memory(group: Values) -> float:
    return float(str(group["memory"]).removesuffix("Gi")) * GIB
