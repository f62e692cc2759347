"""A safetensors file written front to back from parts that come in any order: only what is incomplete is in memory."""

import json
import struct
from collections.abc import Mapping
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor

from model.safetensors_header import CheckpointError
from model.tensors import Shape

Index = tuple[slice, ...]
"""A part of a tensor, as in tensor[index]; () is all of it."""
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
ALIGNMENT = 8  # of the data's beginning, as the format's own writer has it


class TensorFile:
    """Tensors go to disk in the order in which they were declared, each as soon as it and those before are whole."""

    def __init__(self, file: BinaryIO, tensors: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
        """`tensors` are the dtype and the shape of each; those of wider numbers are put first, so that all align."""
        self._file = file
        ordered = sorted(tensors.items(), key=lambda item: -item[1][0].itemsize)
        self._shapes = dict(ordered)
        self._missing = {name: prod(shape) for name, (_, shape) in ordered}  # numbers that have not come
        self._parts: dict[str, Tensor] = {}
        file.write(_header(self._shapes))

    def put(self, name: str, values: Tensor, index: Index = ()) -> None:
        """Take one part, in any dtype; no number may come twice."""
        dtype, shape = self._shapes[name]
        if name not in self._parts:
            self._parts[name] = torch.empty(shape, dtype=dtype)
        part = self._parts[name][index]
        assert part.shape == values.shape, f"{name}: {tuple(values.shape)} into {tuple(part.shape)}"
        part.copy_(values.detach())
        self._missing[name] -= values.numel()
        self._write_whole()

    def _write_whole(self) -> None:
        while self._missing:
            name, missing = next(iter(self._missing.items()))
            if missing:
                return
            self._file.write(self._parts.pop(name).view(torch.uint8).numpy().data)
            del self._missing[name]


def rounded(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the dtype that they are to be stored in; raises CheckpointError where one becomes infinite in it."""
    narrow = values.detach().to(dtype)
    if not narrow.isfinite().all() and values.isfinite().all():
        raise CheckpointError(
            f"{name} has numbers of up to {values.abs().max().item():g}, and {NAMES[dtype]} none beyond "
            f"{torch.finfo(dtype).max:g}: begin again with a base in BF16 or F32, or with a lower lr"
        )
    return narrow


def _header(tensors: Mapping[str, tuple[torch.dtype, Shape]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    return struct.pack("<Q", len(encoded)) + encoded
