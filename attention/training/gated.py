"""silu(gate) · up with gradients."""

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from kernels import gated as kernel
from kernels.native import native_serves


def gated(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) · up, [T, I]."""
    if not native_serves(gate_TI):
        return F.silu(gate_TI) * up_TI
    out: Tensor = _Gated.apply(gate_TI, up_TI)  # type: ignore[no-untyped-call]
    return out


class _Gated(autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        return kernel.gated(gate_TI, up_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TI: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        dgate_TI, dup_TI = kernel.gated_gradients(gate_TI, up_TI, dh_TI).chunk(2, dim=-1)
        return dgate_TI, dup_TI
