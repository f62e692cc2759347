"""What a recipe trains: on the hosts, and on the dense side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experts.training.adamw import AdamW
from experts.training.spec import ExpertTraining, LowRank
from model.adapters.errors import AdapterError
from model.adapters.spec import LoraSpec, lora_targets, lora_tensors
from model.config import ModelConfig
from router.holding import Pair
from services.training.recipe import Recipe

ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
GROUPS = {
    "attention": ATTENTION,
    "dense": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "shared": ("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
}


@dataclass(frozen=True, slots=True)
class Method:
    """`factors` are LoRA's first matrices of the dense side, a function of the seed."""

    experts: ExpertTraining
    trains_dense: Callable[[str], bool]
    lora: LoraSpec | None
    factors: Mapping[str, Tensor]

    @property
    def scale(self) -> float:
        return self.lora.scaling if self.lora is not None else 0.0


def make_method(recipe: Recipe, config: ModelConfig, run_id: str, chosen: tuple[Pair, ...] | None = None) -> Method:
    """`chosen` are the experts that ESFT trains. Raises AdapterError for targets that the model lacks."""
    lora = lora_spec(recipe, config) if recipe.method == "lora" else None
    only: tuple[Pair, ...] | None = None
    if recipe.method == "esft":
        only = chosen or ()
    elif lora is not None and not lora.routed_experts:
        only = ()
    optimizer = recipe.optimizer
    experts = ExpertTraining(
        run_id=run_id,
        seed=recipe.seed,
        dtype=recipe.dtype,
        adamw=AdamW(optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay),
        only=only,
        lora=LowRank(lora.rank, lora.alpha) if lora is not None and lora.routed_experts else None,
        keeps=keeps_activations(recipe),
    )
    factors = dict(_first_factors(config, lora, recipe.seed)) if lora is not None else {}
    full = recipe.method == "full"
    return Method(experts, lambda name: full, lora, factors)


def keeps_activations(recipe: Recipe) -> bool:
    """Whether the hosts keep what forward computed; rows that are dropped come forward, and not back."""
    return not recipe.checkpointing and not recipe.drop_tokens


def lora_spec(recipe: Recipe, config: ModelConfig) -> LoraSpec:
    """The targets by their layers' names; those of a group that this model lacks are left out.

    Raises AdapterError where none is left.
    """
    possible = lora_targets(config)
    targets: list[str] = []
    for target in recipe.lora.targets:
        if target in GROUPS:
            targets.extend(name for name in GROUPS[target] if name in possible)
        elif target != "experts":
            targets.append(target)
    if not targets and "experts" not in recipe.lora.targets:
        raise AdapterError(
            f"lora.targets is {list(recipe.lora.targets)}, and this model has no such layers; expected some of "
            f"experts, {', '.join(possible)}"
        )
    return LoraSpec(
        rank=recipe.lora.rank,
        alpha=recipe.lora.alpha,
        targets=tuple(dict.fromkeys(targets)),
        routed_experts="experts" in recipe.lora.targets,
    )


def _first_factors(config: ModelConfig, spec: LoraSpec, seed: int) -> list[tuple[str, Tensor]]:
    """A as PEFT draws it, uniform in ± in^-0.5, B zero."""
    factors: list[tuple[str, Tensor]] = []
    dense = [item for item in lora_tensors(config, spec).items() if ".mlp.experts." not in item[0]]
    for number, (name, shape) in enumerate(dense):
        if name.endswith("lora_B"):
            factors.append((name, torch.zeros(shape)))
        else:
            draw = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, 1]))
            values = torch.from_numpy(draw.random(shape, dtype=np.float32))
            factors.append((name, (2 * values - 1) * shape[1] ** -0.5))
    return factors
