"""Weights as the native kernels read them: panels of 32 outputs, whose numbers for one input lie side by side.

A panel's numbers are fp32, or bf16 that is widened in registers.
"""

import ctypes

import torch
from torch import Tensor

from kernels.memory import weight_memory
from kernels.native import native

PANEL = 32  # as kernels/csrc/rows.h has it
LANES = 16


def padded(inner: int) -> int:
    """Inputs of a panel, a multiple of the vector's width."""
    return -(-inner // LANES) * LANES


def kept_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """In which native kernels keep weights of these dtypes: bfloat16 where all are, as it widens exactly; else float32.

    Either way they are multiplied in float32. Where torch computes on a CPU, all are kept in float32.
    """
    return torch.bfloat16 if all(dtype == torch.bfloat16 for dtype in dtypes) else torch.float32


def packed_numbers(outputs: int, depth: int, count: int = 1) -> int:
    """Numbers that `count` matrices [outputs, depth] take when packed."""
    return -(-outputs // PANEL) * PANEL * padded(depth) * count


class PackedMatrix:
    """Matrices [outputs, inner] in one run of panels, the first panel of each, then the second of each, and so on.

    What is added to fill a panel is 0. `depth` is at least `inner`, for a product whose left side is wider.
    """

    def __init__(self, *weights: Tensor, depth: int = 0, memory: Tensor | None = None) -> None:
        """Weights of one dtype among those of `kept_dtype`. `memory`, of that dtype, holds `packed_numbers` of them at
        its beginning; without it, it is taken here.
        """
        self.outputs, self.inner = weights[0].shape
        self.count = len(weights)
        self.depth = max(padded(self.inner), padded(depth))
        numbers = packed_numbers(self.outputs, self.depth, self.count)
        self.data = weight_memory(numbers, weights[0].dtype) if memory is None else memory[:numbers]
        assert self.data.dtype in (torch.float32, torch.bfloat16)
        for index, weight in enumerate(weights):
            assert weight.shape == weights[0].shape
            assert weight.dtype == self.data.dtype
            plain = weight.contiguous()
            _library().shoal_pack(
                plain.data_ptr(), self.outputs, self.inner, self.depth, self._address(index), self.count, self.narrow
            )

    @property
    def address(self) -> int:
        return self.data.data_ptr()

    @property
    def narrow(self) -> bool:
        """Whether the numbers are bf16."""
        return self.data.dtype == torch.bfloat16

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def unpack(self, index: int = 0) -> Tensor:
        """One of the matrices, [outputs, inner]."""
        plain = torch.empty(self.outputs, self.inner, dtype=self.data.dtype)
        _library().shoal_unpack(
            self._address(index), self.outputs, self.inner, self.depth, plain.data_ptr(), self.count, self.narrow
        )
        return plain

    def _address(self, index: int) -> int:
        return self.address + index * self.depth * PANEL * self.data.element_size()


def _library() -> ctypes.CDLL:
    library = native()
    assert library is not None, "packed weights are for the native kernels"
    return library
