"""What a dry run says of memory is what a step then takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from attention.training.decoder import ForwardOptions
from attention.training.parameters import DenseParameters
from model.config import read_config
from services.training.forecast import forecast
from services.training.method import make_method
from services.training.recipe import Recipe, parse_recipe
from tests.training.rig import Rig, make_rig, plans, samples
from tests.training.small_run import small_run

LENGTHS = (64, 64, 64, 64)


def make_recipe(model: Path, place: Path, **given: Any) -> Recipe:
    tokens = sum(LENGTHS)
    return parse_recipe(small_run(model, place) | {"batch_tokens": tokens, "micro_batch_tokens": tokens} | given)


def trained(model: Path, recipe: Recipe) -> Rig:
    """After one step, which all experts take part in."""
    config = read_config(model)
    every = tuple((layer, expert) for layer in config.moe_layers for expert in range(config.n_routed_experts))
    method = make_method(recipe, config, "run", every)

    def make_dense(checkpoint: Any) -> DenseParameters:
        return DenseParameters.load(checkpoint, method.trains_dense, method.factors, method.scale, recipe.dtype)

    options = ForwardOptions(checkpointing=recipe.checkpointing)
    experts, workers = recipe.experts, recipe.workers.least
    rig = make_rig(
        model, experts.hosts, experts.replicas, workers, training=method.experts, options=options, make_dense=make_dense
    )
    rig.step(plans(0, [[samples(512, LENGTHS, seed)] for seed in range(workers)]))
    return rig


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"dtype": "bfloat16"},
        {"experts": {"hosts": 3, "replicas": 2}, "workers": {"least": 2}},
        {"method": "lora", "lora": {"rank": 3}},
        {"method": "esft"},
        {"method": "esft", "dtype": "bfloat16"},
    ],
    ids=["full", "bf16", "replicas", "lora", "esft", "esft-bf16"],
)
def test_weights_gradients_and_moments_are_counted(
    checkpoint: Callable[[str], Path], tmp_path: Path, given: dict[str, Any]
) -> None:
    model = checkpoint("mini")
    recipe = make_recipe(model, tmp_path, **given)
    needs, rig = forecast(recipe, read_config(model)), trained(model, recipe)
    held = [sum(host.expert(pair).nbytes for pair in host.host.held) for host in rig.hosts.values()]
    assert max(held) == needs.host_bytes
    workers = []
    for dense, optimizer in zip(rig.denses, rig.optimizers, strict=True):
        values = {name: tensor.nbytes for name, tensor in dense.values()}
        values |= {name: one.value.nbytes for name, one in dense.trained.items()}
        gradients = sum(one.value.nbytes for one in dense.trained.values())
        workers.append(sum(values.values()) + gradients + sum(one.nbytes for one in optimizer.moments().values()))
    assert max(workers) == pytest.approx(needs.worker_bytes, rel=0.1)  # moments are not divided to the byte


def test_activations_are_estimated_and_checkpointing_keeps_fewer(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, kept = checkpoint("mini"), []
    for checkpointing in (False, True):
        recipe = make_recipe(model, tmp_path, checkpointing=checkpointing)
        sizes: dict[int, int] = {}
        saved: list[Tensor] = []  # so that no memory is used twice

        def note(tensor: Tensor, sizes: dict[int, int] = sizes, saved: list[Tensor] = saved) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            rig = trained(model, recipe)
        for name, _ in rig.denses[0].values():
            sizes.pop(rig.denses[0][name].untyped_storage().data_ptr(), None)
        kept.append(sum(sizes.values()))
        on_the_way = 2 * 4 * sum(LENGTHS) * 512  # logits made anew, and their gradients
        assert kept[-1] + on_the_way == pytest.approx(forecast(recipe, read_config(model)).activation_bytes, rel=0.2)
    assert kept[1] < 0.5 * kept[0]
