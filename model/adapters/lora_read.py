"""A LoRA adapter in PEFT's format, opened without reading its weights; applied to one tensor of the base at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from model.adapters.errors import AdapterError
from model.adapters.lora_config import FILE, LoraSettings, read_lora_config
from model.adapters.lora_layout import DOWN, GATE_UP, PREFIX, Index, a_index, b_index, routed
from model.config import ModelConfig
from model.safetensors_header import TensorEntry, read_header
from model.tensors import Shape, expected_tensors

if TYPE_CHECKING:  # whoever reads no weights needs no torch
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
ALL: Index = (slice(None), slice(None))
NAMED = 5  # misfits named in full in one error
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_HOLDER = re.compile(r"(model\.layers\.\d+\.mlp\.experts)(?:\.base_layer)?")
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True, slots=True)
class Factors:
    """The two matrices of one linear layer, or of one kind of all routed experts of a layer."""

    a: str  # names in the file
    b: str
    outputs: int  # of one expert
    rank: int
    scaling: float
    experts: int  # that share them; 0 for a linear layer


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that fits a model; holds no weights."""

    directory: Path
    factors: Mapping[str, Factors]  # by module, as `model.layers.3.mlp.experts.gate_up_proj`

    @property
    def files(self) -> tuple[Path, ...]:
        return self.directory / FILE, self.directory / WEIGHTS

    def changes(self, name: str) -> bool:
        """Whether a tensor of the base, under Hugging Face's name, becomes another."""
        return self._find(name) is not None

    @contextmanager
    def opened(self) -> Iterator[Callable[[str, Tensor], Tensor]]:
        """What turns (name, tensor of the base) into the merged tensor, of the same dtype.

        Of the file it reads only what belongs to the tensor. Raises AdapterError when the outcome is not finite.
        """
        from model.adapters.lora_merge import merge  # torch is loaded only where something is read

        with safe_open(self.directory / WEIGHTS, framework="pt") as file:

            def change(name: str, tensor: Tensor) -> Tensor:
                found = self._find(name)
                if found is None:
                    return tensor
                factors, a_part, b_part = found
                a_RI = file.get_slice(factors.a)[a_part]
                b_OR = file.get_slice(factors.b)[b_part]
                merged = merge(tensor, a_RI, b_OR, factors.scaling)
                if not merged.isfinite().all():
                    raise AdapterError(f"{self.directory} makes {name} infinite or no number: it is damaged")
                return merged

            yield change

    def matrices(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Read matrices under the names of `lora_tensors`, one at a time, in order and in the file's dtype.

        Raises AdapterError naming one that the adapter lacks.
        """
        with safe_open(self.directory / WEIGHTS, framework="pt") as file:
            for name in names:
                module, _, side = name.rpartition(".")
                found = routed(module)
                factors = self.factors.get(module if found is None else f"{found[0]}.{found[2]}")
                if factors is None or side not in ("lora_A", "lora_B"):
                    raise AdapterError(f"{self.directory} has no {name}")
                part = ALL
                if found is not None:
                    expert = found[1]
                    part = a_index(expert, factors.rank) if side == "lora_A" else b_index(expert, factors.experts)
                yield file.get_slice(factors.a if side == "lora_A" else factors.b)[part]

    def _find(self, name: str) -> tuple[Factors, Index, Index] | None:
        found = _EXPERT.fullmatch(name)
        if found is not None:
            holder, expert, part = found[1], int(found[2]), found[3]
            factors = self.factors.get(f"{holder}.{DOWN if part == 'down' else GATE_UP}")
            if factors is not None:
                half = factors.outputs // 2
                rows = {"gate": slice(0, half), "up": slice(half, None), "down": slice(None)}[part]
                return factors, a_index(expert, factors.rank), b_index(expert, factors.experts, rows)
        factors = self.factors.get(name.removesuffix(".weight"))
        return None if factors is None else (factors, ALL, ALL)


def read_adapter(directory: Path | str, config: ModelConfig) -> Adapter:
    """Open an adapter that `write_adapter` or PEFT wrote for this model, experts fused or one by one.

    Raises AdapterError naming what cannot be applied (anything but plain LoRA) and each matrix that does not fit.
    """
    directory = Path(directory)
    settings = read_lora_config(directory / FILE)
    if not (directory / WEIGHTS).is_file():
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
            raise AdapterError(f"{directory} has pickled weights only; save it as safetensors, which runs no code")
        raise AdapterError(f"{directory} has no {WEIGHTS}")
    pairs, problems = _pairs(read_header(directory / WEIGHTS))
    fit = _Fit(config, settings)
    for module, (a, b) in pairs.items():
        problem = fit.add(module, a, b)
        if problem is not None:
            problems.append(problem)
    problems += fit.conflicts()
    if problems:
        rest = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise AdapterError(f"{directory} does not fit the model: {'; '.join(problems[:NAMED])}{rest}")
    if not fit.factors:
        raise AdapterError(f"{directory / WEIGHTS} has no LoRA matrices")
    return Adapter(directory, fit.factors)


def _pairs(entries: Mapping[str, TensorEntry]) -> tuple[dict[str, tuple[Shape, Shape]], list[str]]:
    """Shapes of A and B by module, and what is not of such a pair."""
    found: dict[str, dict[str, Shape]] = {}
    problems: list[str] = []
    for name, entry in entries.items():
        matrix = _MATRIX.fullmatch(name)
        if matrix is None or len(entry.shape) != 2:
            problems.append(f"{name} {list(entry.shape)} is no matrix of LoRA")
        else:
            found.setdefault(matrix[1], {})[matrix[2]] = entry.shape
    problems += [f"{module} has lora_{next(iter(sides))} alone" for module, sides in found.items() if len(sides) == 1]
    return {module: (sides["A"], sides["B"]) for module, sides in found.items() if len(sides) == 2}, problems


class _Fit:
    """Takes pairs one by one and keeps those that fit the model."""

    def __init__(self, config: ModelConfig, settings: LoraSettings) -> None:
        self.factors: dict[str, Factors] = {}
        self._config = config
        self._settings = settings
        self._expected = expected_tensors(config)

    def add(self, module: str, a: Shape, b: Shape) -> str | None:
        """Say what is wrong with it, if anything."""
        held = _HOLDER.fullmatch(module)
        if held is not None and f"{held[1]}.0.down_proj.weight" in self._expected:
            return self._add_routed(module, held[1], a, b)
        expected = self._expected.get(f"{module}.weight", ())
        if len(expected) != 2 or module == "model.embed_tokens":
            return f"the model has no linear layer {module}"
        return self._keep(module, module, a, b, expected, 0)

    def conflicts(self) -> list[str]:
        """Experts that are adapted by themselves and with all of their layer."""
        found = [(module, _EXPERT.fullmatch(f"{module}.weight")) for module in self.factors]
        return [
            f"{module} is adapted twice"
            for module, one in found
            if one is not None and f"{one[1]}.{DOWN if one[3] == 'down' else GATE_UP}" in self.factors
        ]

    def _add_routed(self, wrapper: str, holder: str, a: Shape, b: Shape) -> str | None:
        """The shapes tell which of the two parameters is wrapped: at most one of them can fit."""
        hidden, width = self._config.hidden_size, self._config.moe_intermediate_size
        kinds = {GATE_UP: (2 * width, hidden), DOWN: (hidden, width)}
        for kind, (outputs, inputs) in kinds.items():
            if b[0] == outputs and a[1] == inputs:
                return self._keep(f"{holder}.{kind}", wrapper, a, b, (outputs, inputs), self._config.n_routed_experts)
        return (
            f"{wrapper} goes from {a[1]} to {b[0]}, the model's routed experts from {hidden} to {2 * width} "
            f"({GATE_UP}) and from {width} to {hidden} ({DOWN})"
        )

    def _keep(self, module: str, wrapper: str, a: Shape, b: Shape, expected: Shape, experts: int) -> str | None:
        rank, scaling = self._settings.of(module)
        outputs, inputs = expected
        copies = max(experts, 1)
        for side, shape, fitting in (("A", a, (rank * copies, inputs)), ("B", b, (outputs, rank * copies))):
            if shape != fitting:
                ranks = f"rank {rank} and {experts} experts" if experts else f"rank {rank}"
                return f"{wrapper}.lora_{side} is {list(shape)}, expected {list(fitting)} for {ranks}"
        if module in self.factors:
            return f"{module} is adapted twice"
        name = f"{PREFIX}{wrapper}"
        self.factors[module] = Factors(
            f"{name}.lora_A.weight", f"{name}.lora_B.weight", outputs, rank, scaling, experts
        )
        return None
