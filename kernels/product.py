"""Products of two matrices that change before they meet again, as in training: they are packed for one product alone.

Beside many rows packing costs little, and work goes tile by tile to whichever core is free, where a library's equal
parts wait for the one whose core others use.
"""

import torch
from torch import Tensor

from kernels.native import native_for

LEAST = 128  # rows and outputs, from which packing is little beside the product


def product(a_RK: Tensor, b_KN: Tensor) -> Tensor:
    """a · b, [R, N], each summed over rising K. Raises RuntimeError where they do not fit, as torch.mm does.

    With native kernels, fp32 and many rows, an output's bits depend on its row and column alone, not on threads.
    """
    (rows, inner), outputs = a_RK.shape, b_KN.shape[1]
    library = native_for(a_RK.device)
    fp32 = a_RK.dtype is torch.float32 and b_KN.dtype is torch.float32
    if library is None or not fp32 or min(rows, outputs) < LEAST or inner == 0 or b_KN.shape[0] != inner:
        return torch.mm(a_RK, b_KN)
    a, a_stride, a_turned = _laid(a_RK)
    b, b_stride, b_turned = _laid(b_KN.t())  # its columns are the rows that panels are made of
    out_RN = torch.empty(rows, outputs)
    library.shoal_product(
        a.data_ptr(),
        a_stride,
        a_turned,
        rows,
        b.data_ptr(),
        b_stride,
        b_turned,
        inner,
        outputs,
        out_RN.data_ptr(),
        outputs,
    )
    return out_RN


def _laid(matrix: Tensor) -> tuple[Tensor, int, bool]:
    """A matrix as it lies in memory, with what its rows or, where it is turned, its columns are apart."""
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return matrix, matrix.stride(0), False
    if matrix.stride(0) == 1 and matrix.stride(1) >= matrix.shape[0]:
        return matrix, matrix.stride(1), True
    return matrix.contiguous(), matrix.shape[1], False
