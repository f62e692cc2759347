"""Routed experts as one differentiable function of a layer's input and its gate weights."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from experts.dispatch import Dispatch
from experts.training.client import TrainingClient
from router.gate import Routing


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        keep_TK: Tensor | None,
        client: TrainingClient,
        dispatch: Dispatch,
        layer: int,
        micro: int,
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weights_TK, experts_TK, keep_TK)
        ctx.call = (client, layer, micro)
        return dispatch.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, experts_TK, keep_TK = ctx.saved_tensors
        client, layer, micro = ctx.call
        routing = Routing(experts_TK, weights_TK)
        dx_TD, dweights_TK = client.backward(layer, micro, x_TD, dout_TD, routing, keep_TK)
        return dx_TD.to(x_TD.dtype), dweights_TK, None, None, None, None, None, None


def routed_experts(
    client: TrainingClient,
    dispatch: Dispatch,
    x_TD: Tensor,
    routing: Routing,
    layer: int,
    micro: int,
    keep_TK: Tensor | None = None,
) -> Tensor:
    """Σ_k weight[t, k] · expert(x[t]), [T, D] fp32, of a dispatch of the same rows that is under way.

    Its gradient reaches x and the weights here, and the experts' parameters on their hosts. Weights of slots that are
    not kept must be 0. Raises StepLost where an expert has no holder left, in backward too.
    """
    out: Tensor = _Routed.apply(x_TD, routing.weights_TK, routing.experts_TK, keep_TK, client, dispatch, layer, micro)  # type: ignore[no-untyped-call]
    return out
