"""Root-mean-square normalisation with gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.norm import rms_norm, rms_norm_gradients


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32 and rounded to x's dtype."""
    out: Tensor = _Norm.apply(x.float(), weight.float(), eps)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = rms_norm_gradients(dout, x, weight, ctx.eps)
        wants_x, wants_weight, _ = ctx.needs_input_grad
        return dx if wants_x else None, dweight if wants_weight else None, None
