"""The Serve config that the chart writes, as Ray Serve and the application read it."""

import json
from pathlib import Path

import pytest
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeDeploySchema

from services.app import build
from services.app_args import AppArgs
from tests.helm.charts import CHART, EXAMPLES, Values, example, render, serve_config

ALL: Values = {
    "tls": {"secret": "pem", "serverName": "shoal"},
    "experts": {"autoRebalance": True, "gpus": 1},
    "attention": {"gpus": 1},
}


def deployed(values: Values | None = None) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(serve_config(render(values)))


@pytest.mark.parametrize("values", [{}, ALL, *map(example, EXAMPLES)])
def test_serve_takes_it(values: Values) -> None:
    (application,) = deployed(values).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert application.route_prefix == "/"
    assert [deployment.name for deployment in application.deployments] == ["attention", "ingress"]


@pytest.mark.parametrize("values", [{}, ALL, *map(example, EXAMPLES)])
def test_the_application_takes_its_arguments(values: Values) -> None:
    taken = AppArgs.model_validate(deployed(values).applications[0].args)
    assert taken.experts.node_resource == "shoal_expert"
    assert taken.control_cpus > 0


@pytest.mark.parametrize(
    "values",
    [
        {"experts": {"replicas": 7}},
        {"attention": {"replicas": 3}},
        {"serve": {"ingressReplicas": 2}},
        {"experts": {"drainSeconds": 1, "labels": {"a": "b"}}},
        {"service": {"port": 80}},
        {"auth": {"existingSecret": "other"}},
    ],
)
def test_scaling_replaces_no_worker(values: Values) -> None:
    """Serve builds the application anew, and replaces its replicas, when this version changes."""
    first, then = (deployed(each).applications[0] for each in (None, values))
    assert get_app_code_version(first) == get_app_code_version(then)


def test_numbers_of_replicas_are_given_to_serve() -> None:
    values: Values = {"attention": {"replicas": 3}, "serve": {"ingressReplicas": 2}}
    attention, ingress = deployed(values).applications[0].deployments
    assert (attention.num_replicas, attention.max_replicas_per_node, ingress.num_replicas) == (3, 1, 2)


@pytest.mark.parametrize(
    ("experts", "fewest"),
    [
        ({"memory": "29Gi", "replicas": 4}, 2),
        ({"memory": "16Gi", "replicas": 6}, 4),
        ({"memory": "60Gi", "replicas": 6}, 1),
        ({"memory": "60Gi", "replicas": 6, "copies": 3}, 3),
        ({"memory": "60Gi", "replicas": 6, "minReplicas": 5}, 5),
        ({"gpus": 1, "gpuMemory": "16Gi", "replicas": 6}, 2),
    ],
)
def test_the_service_starts_with_as_few_hosts_as_hold_the_model(experts: Values, fewest: int) -> None:
    shape = {"hiddenSize": 2048, "moeIntermediateSize": 1408, "routedExperts": 64, "moeLayers": 26}
    values: Values = {"model": {"shape": shape}, "experts": experts}
    assert deployed(values).applications[0].args["experts"]["hosts"] == fewest


def test_the_bundled_example_names_the_bundled_models_shape() -> None:
    config = json.loads((CHART.parents[1] / "models" / "bundled" / "config.json").read_text())
    (path,) = (path for path in EXAMPLES if path.stem == "bundled-cpu")
    assert example(path)["model"]["shape"] == {
        "hiddenSize": config["hidden_size"],
        "moeIntermediateSize": config["moe_intermediate_size"],
        "routedExperts": config["n_routed_experts"],
        "moeLayers": config["num_hidden_layers"] - config["first_k_dense_replace"],
    }


def test_an_expert_takes_the_memory_that_the_chart_counts() -> None:
    """The refusals name 53.6 GiB for V2-Lite's 26 layers of 64 experts in fp32, and half of it in bf16."""
    import torch

    from kernels.experts import PackedExperts

    for dtype, gibibytes in ((torch.float32, 53.6), (torch.float16, 53.6), (torch.bfloat16, 26.8)):
        store = PackedExperts(2048, 1408)
        store.load(0, *(torch.zeros(shape, dtype=dtype) for shape in ((1408, 2048), (1408, 2048), (2048, 1408))))
        assert round(store.nbytes * 26 * 64 / 2**30, 1) == gibibytes


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem in ("v2-8-gpus", "v2-16-gpus")], ids=lambda path: path.stem
)
def test_examples_in_which_a_change_would_not_fit_begin_with_all_their_hosts(path: Path) -> None:
    """A change keeps routing groups whole, and two of V2's are more than such a GPU has."""
    values = example(path)
    (application,) = serve_config(render(values))["applications"]
    assert application["args"]["experts"]["hosts"] == values["experts"]["replicas"]
    assert not application["args"]["experts"]["auto_rebalance"]
