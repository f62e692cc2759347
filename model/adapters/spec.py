"""What a LoRA adapter changes, and every matrix that it must hold, under our own names."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from model.adapters.errors import AdapterError
from model.config import ModelConfig
from model.tensors import Shape, expected_tensors, expert_names

DENSE = "mlp"
SHARED = "shared_experts"


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """W + scaling · B · A for every target: A [rank, in], B [out, rank] (arXiv 2106.09685).

    A target is the name of a linear layer ("q_proj", "kv_b_proj", "gate_proj", …) and means all of that name in
    attention, dense layers and shared experts; "mlp.gate_proj" means those of dense layers only and
    "shared_experts.gate_proj" those of shared experts only. Routed experts are one switch: gate and up have one A.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    routed_experts: bool = False
    rslora: bool = False  # scaling by the root of the rank (arXiv 2312.03732)

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise AdapterError(f"LoRA's rank is {self.rank!r}; expected an integer of at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"LoRA's alpha is {self.alpha!r}; expected a finite number above 0")
        if not self.targets and not self.routed_experts:
            raise AdapterError("LoRA has no targets and no routed experts; expected at least one of them")

    @property
    def scaling(self) -> float:
        return lora_scaling(self.alpha, self.rank, self.rslora)


def lora_scaling(alpha: float, rank: int, rslora: bool) -> float:
    """The factor before B · A."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def lora_targets(config: ModelConfig) -> tuple[str, ...]:
    """What `LoraSpec.targets` may name for this model."""
    return tuple(dict.fromkeys(target for module, _ in _linears(config) for target in _targets(module)))


def lora_tensors(config: ModelConfig, spec: LoraSpec) -> dict[str, Shape]:
    """Name to shape of every LoRA matrix, in the order of the layers.

    `model.layers.3.self_attn.q_proj.lora_A` is [r, in] and its `.lora_B` [out, r]; of a routed expert,
    `model.layers.3.mlp.experts.7.gate_up_proj.lora_A` is [r, H], its `.lora_B` [2·Im, r] (gate's rows, then up's),
    `…7.down_proj.lora_A` [r, Im], its `.lora_B` [H, r]. Raises AdapterError naming a target that the model lacks.
    """
    tensors: dict[str, Shape] = {}
    for module, (outputs, inputs) in lora_modules(config, spec).items():
        tensors[f"{module}.lora_A"] = (spec.rank, inputs)
        tensors[f"{module}.lora_B"] = (outputs, spec.rank)
    return tensors


def lora_modules(config: ModelConfig, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """(out, in) of every matrix that the adapter changes, fused gate and up as one; raises as `lora_tensors`."""
    possible = lora_targets(config)
    unknown = [target for target in spec.targets if target not in possible]
    if unknown:
        raise AdapterError(f"LoRA targets {', '.join(unknown)}: no such layers; expected some of {', '.join(possible)}")
    if spec.routed_experts and not config.moe_layers:
        raise AdapterError("LoRA is to change routed experts, and the model has none: leave routed_experts out")
    wanted = set(spec.targets)
    modules = {module: shape for module, shape in _linears(config) if wanted.intersection(_targets(module))}
    if spec.routed_experts:
        modules |= _routed(config)
    return dict(sorted(modules.items(), key=lambda item: int(item[0].split(".")[2])))


def _routed(config: ModelConfig) -> dict[str, tuple[int, int]]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    modules: dict[str, tuple[int, int]] = {}
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            prefix = expert_names(layer, expert)[0].removesuffix(".gate_proj.weight")
            modules[f"{prefix}.gate_up_proj"] = (2 * width, hidden)
            modules[f"{prefix}.down_proj"] = (hidden, width)
    return modules


def _linears(config: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Linear layers of attention, dense layers and shared experts."""
    for name, shape in expected_tensors(config).items():
        if len(shape) == 2 and ".layers." in name and not name.endswith(".mlp.gate.weight") and ".experts." not in name:
            yield name.removesuffix(".weight"), (shape[0], shape[1])


def _targets(module: str) -> tuple[str, ...]:
    """What may name it, in a spec."""
    *_, parent, last = module.split(".")
    return (last, f"{parent}.{last}") if parent in (DENSE, SHARED) else (last,)
