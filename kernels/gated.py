"""silu(gate) · up and its gradients, which networks in training have between their products, in fp32.

Shapes: `R` rows, `I` intermediate. Gate and up are [R, I], apart or both halves of what one product made.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.native import check_dense, native, native_serves


def gated(gate_RI: Tensor, up_RI: Tensor) -> Tensor:
    """silu(gate) · up, [R, I]. With native kernels a row's bits are its own."""
    if not native_serves(gate_RI):
        return F.silu(gate_RI) * up_RI
    library = native()
    assert library is not None
    gate_RI, up_RI, stride = _laid(gate_RI, up_RI)
    out_RI = torch.empty(gate_RI.shape)
    library.shoal_gated(gate_RI.data_ptr(), up_RI.data_ptr(), stride, *gate_RI.shape, out_RI.data_ptr())
    return out_RI


def gated_gradients(gate_RI: Tensor, up_RI: Tensor, dh_RI: Tensor) -> Tensor:
    """Gradients of gate and up for that of what `gated` gives: both halves of [R, 2I]. For what it serves alone."""
    library = native()
    assert library is not None
    gate_RI, up_RI, stride = _laid(gate_RI, up_RI)
    rows, width = gate_RI.shape
    dh_RI, dgate_up_R2I = dh_RI.contiguous(), torch.empty(rows, 2 * width)
    check_dense(torch.float32, dh_RI)
    assert dh_RI.shape == gate_RI.shape
    library.shoal_gated_gradients(
        gate_RI.data_ptr(),
        up_RI.data_ptr(),
        stride,
        dh_RI.data_ptr(),
        None,
        rows,
        width,
        dgate_up_R2I.data_ptr(),
        None,
        None,
    )
    return dgate_up_R2I


def weighted_gradients(
    gate_RI: Tensor, up_RI: Tensor, weight_R: Tensor, dh_RI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of weight · h, for its gradient dh, with h what `gated` gives.

    Gradients of gate and up, both halves of [R, 2I]; weight · h itself, [R, I]; and the weights' gradients, [R].
    """
    if not native_serves(gate_RI):
        return _by_torch(gate_RI, up_RI, weight_R, dh_RI)
    library = native()
    assert library is not None
    gate_RI, up_RI, stride = _laid(gate_RI, up_RI)
    rows, width = gate_RI.shape
    dh_RI, weight_R = dh_RI.contiguous(), weight_R.contiguous()
    check_dense(torch.float32, dh_RI, weight_R)
    assert dh_RI.shape == gate_RI.shape
    assert weight_R.shape == (rows,)
    dgate_up_R2I, h_RI, dweight_R = torch.empty(rows, 2 * width), torch.empty(rows, width), torch.empty(rows)
    library.shoal_gated_gradients(
        gate_RI.data_ptr(),
        up_RI.data_ptr(),
        stride,
        dh_RI.data_ptr(),
        weight_R.data_ptr(),
        rows,
        width,
        dgate_up_R2I.data_ptr(),
        h_RI.data_ptr(),
        dweight_R.data_ptr(),
    )
    return dgate_up_R2I, h_RI, dweight_R


def _laid(gate_RI: Tensor, up_RI: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both with their numbers side by side, and what their rows are apart."""
    assert gate_RI.dtype is up_RI.dtype is torch.float32
    assert gate_RI.shape == up_RI.shape
    if gate_RI.stride() != up_RI.stride() or gate_RI.stride(1) != 1:
        gate_RI, up_RI = gate_RI.contiguous(), up_RI.contiguous()
    return gate_RI, up_RI, gate_RI.stride(0)


def _by_torch(gate_RI: Tensor, up_RI: Tensor, weight_R: Tensor, dh_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sigmoid_RI, weight_R1 = torch.sigmoid(gate_RI), weight_R[:, None]
    silu_RI = gate_RI * sigmoid_RI
    h_RI = silu_RI * up_RI
    dweight_R = (dh_RI * h_RI).sum(-1)
    dh_RI = dh_RI * weight_R1
    dgate_RI = dh_RI * up_RI * (sigmoid_RI + silu_RI * (1 - sigmoid_RI))
    return torch.cat((dgate_RI, dh_RI * silu_RI), dim=-1), h_RI.mul_(weight_R1), dweight_R
