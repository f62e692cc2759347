"""Weights as the native kernels read them: panels of 32 outputs, whose numbers for one input lie side by side."""

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


def packed_floats(outputs: int, depth: int, count: int = 1) -> int:
    """Numbers that `count` matrices [outputs, depth] take when packed."""
    return -(-outputs // PANEL) * PANEL * padded(depth) * count


class PackedMatrix:
    """Matrices [outputs, inner] in one run of panels, the first panel of each, then the second of each, and so on.

    What is added to fill a panel is 0. `depth` is at least `inner`, for a product whose left side is wider.
    """

    def __init__(self, *weights: Tensor, depth: int = 0, memory: Tensor | None = None) -> None:
        """`memory` holds `packed_floats` of these weights at its beginning; without it, it is taken here."""
        self.outputs, self.inner = weights[0].shape
        self.count = len(weights)
        self.depth = max(padded(self.inner), padded(depth))
        floats = packed_floats(self.outputs, self.depth, self.count)
        self.data = weight_memory(floats) if memory is None else memory[:floats]
        for index, weight in enumerate(weights):
            assert weight.shape == weights[0].shape
            plain = weight.float().contiguous()
            _library().shoal_pack(
                plain.data_ptr(), self.outputs, self.inner, self.depth, self._address(index), self.count
            )

    @property
    def address(self) -> int:
        return self.data.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def unpack(self, index: int = 0) -> Tensor:
        """One of the matrices, [outputs, inner]."""
        plain = torch.empty(self.outputs, self.inner)
        _library().shoal_unpack(
            self._address(index), self.outputs, self.inner, self.depth, plain.data_ptr(), self.count
        )
        return plain

    def _address(self, index: int) -> int:
        return self.address + index * self.depth * PANEL * self.data.element_size()


def _library() -> ctypes.CDLL:
    library = native()
    assert library is not None, "packed weights are for the native kernels"
    return library
