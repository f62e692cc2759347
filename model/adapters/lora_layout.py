"""Where PEFT's adapter file keeps each matrix (matched: peft 0.21 on transformers 5).

A linear layer's matrices stand as they are. transformers holds the routed experts of a layer as two 3-D parameters,
`experts.gate_up_proj` [E, 2·Im, H] and `experts.down_proj` [E, H, Im], and PEFT keeps one A and one B for each:

- A [E·r, in]: expert e's rows are e·r … e·r + r − 1;
- B [out, r·E]: expert e's columns are e, E + e, 2·E + e, …

It wraps the module `experts` once a parameter, so that a name tells how deep the wrapper is and not what it wraps: with
both adapted, down_proj's A is `experts.lora_A` and gate_up_proj's `experts.base_layer.lora_A`; the only one that is
adapted has the shorter name.
"""

import re
from dataclasses import dataclass

from model.tensors import Shape

PREFIX = "base_model.model."
GATE_UP, DOWN = "gate_up_proj", "down_proj"
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_up_proj|down_proj)")

Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """One of our matrices in PEFT's file: a whole tensor, or the part of it that `index` names."""

    tensor: str
    shape: Shape  # of the whole tensor
    index: Index = ()


def place(matrix: str, shape: Shape, experts: int) -> Place:
    """Where the matrix that `lora_tensors` calls so, of that shape, goes; `experts` are those of a layer."""
    module, _, side = matrix.rpartition(".")
    found = routed(module)
    if found is None:
        return Place(f"{PREFIX}{module}.{side}.weight", shape)
    holder, expert, part = found
    wrapper = holder if part == DOWN else f"{holder}.base_layer"
    name = f"{PREFIX}{wrapper}.{side}.weight"
    rows, columns = shape
    if side == "lora_A":
        return Place(name, (experts * rows, columns), a_index(expert, rows))
    return Place(name, (rows, columns * experts), b_index(expert, experts))


def routed(module: str) -> tuple[str, int, str] | None:
    """Of a routed expert's matrix: the name of all experts of its layer, its number, and which of its matrices."""
    found = _EXPERT.fullmatch(module)
    return None if found is None else (found[1], int(found[2]), found[3])


def a_index(expert: int, rank: int) -> Index:
    """An expert's part of A [E·r, in]."""
    return slice(expert * rank, (expert + 1) * rank), slice(None)


def b_index(expert: int, experts: int, rows: slice = slice(None)) -> Index:
    """An expert's part of B [out, r·E], or some rows of it."""
    return rows, slice(expert, None, experts)
