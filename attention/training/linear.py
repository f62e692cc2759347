"""A linear map with gradients, its three products by `kernels.product`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.product import product


def linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """x · weightᵀ, [T, N]."""
    out: Tensor = _Linear.apply(x_TK, weight_NK)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad
        ctx.save_for_backward(x_TK if wants_weight else None, weight_NK if wants_x else None)
        return product(x_TK, weight_NK.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TK, weight_NK = ctx.saved_tensors
        dx_TK = None if weight_NK is None else product(dout_TN, weight_NK)
        dweight_NK = None if x_TK is None else product(dout_TN.t(), x_TK)
        return dx_TK, dweight_NK
