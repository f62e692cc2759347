"""Causal attention of samples laid flat, each to itself alone, with gradients.

On CPU by kernels that take samples as they lie; else by torch, those of like lengths side by side.
Shapes: `T` tokens, `N` heads, `Q` query and key width, `V` value width, `S` samples of a group, `L` their longest.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.causal import causal_attention, causal_gradients
from kernels.native import native_serves


class SampleGroups:
    """Where a micro-batch's samples lie side by side: those in one group whose lengths differ by less than twice.

    A shorter sample is filled up with its last token: those keys come after all of its own queries, which see none of
    them.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """`lengths` in the order in which the samples lie."""
        starts = [0, *itertools.accumulate(lengths)]
        self._ends = tuple(starts[1:])
        by_size: dict[int, list[int]] = {}
        for sample, length in enumerate(lengths):
            by_size.setdefault(length.bit_length(), []).append(sample)
        self._token_SL: list[Tensor] = []  # of each group, which token is at each place
        self._place_T = torch.empty(starts[-1], dtype=torch.int64, device=device)  # of each token, over all groups
        places = 0
        for samples in by_size.values():
            length_S1 = torch.tensor([[lengths[sample]] for sample in samples], device=device)
            start_S1 = torch.tensor([[starts[sample]] for sample in samples], device=device)
            place_L = torch.arange(int(length_S1.max()), device=device)
            token_SL = start_S1 + place_L.minimum(length_S1 - 1)
            own_SL = place_L < length_S1
            self._place_T[token_SL[own_SL]] = places + own_SL.flatten().nonzero().flatten()
            self._token_SL.append(token_SL)
            places += token_SL.numel()
        self._even = (len(lengths), lengths[0]) if len(set(lengths)) == 1 else None

    def attend(self, q_TNQ: Tensor, k_TNQ: Tensor, v_TNV: Tensor, scale: float) -> Tensor:
        """softmax(scale · q kᵀ, causal) v of each sample, [T, N, V]."""
        given = q_TNQ, k_TNQ, v_TNV
        if native_serves(q_TNQ):
            attended: Tensor = _Causal.apply(*given, self._ends, scale)  # type: ignore[no-untyped-call]
            return attended
        if self._even is not None:  # nothing to move
            q, k, v = (one.unflatten(0, self._even) for one in given)
            return _attend(q, k, v, scale).flatten(0, 1)
        outs: list[Tensor] = []
        for token_SL in self._token_SL:
            q, k, v = (one.index_select(0, token_SL.flatten()).unflatten(0, token_SL.shape) for one in given)
            outs.append(_attend(q, k, v, scale).flatten(0, 1))
        return torch.cat(outs).index_select(0, self._place_T)


def _attend(q_SLNQ: Tensor, k_SLNQ: Tensor, v_SLNV: Tensor, scale: float) -> Tensor:
    values = v_SLNV.shape[-1]
    q, k, v = (one.transpose(1, 2) for one in (q_SLNQ, k_SLNQ, v_SLNV))
    if q.device.type == "cpu":  # torch has a kernel that forms no samples' whole scores, if all are of one width
        width = max(q.shape[-1], values)
        q, k, v = (one if one.shape[-1] == width else F.pad(one, (0, width - one.shape[-1])) for one in (q, k, v))
    out_SNLV = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :values]
    return out_SNLV.transpose(1, 2)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNQ: Tensor, k_TNQ: Tensor, v_TNV: Tensor, ends: tuple[int, ...], scale: float) -> Tensor:
        out_TNV, logs_NT = causal_attention(q_TNQ, k_TNQ, v_TNV, ends, scale)
        ctx.save_for_backward(q_TNQ, k_TNQ, v_TNV, out_TNV, logs_NT)
        ctx.ends, ctx.scale = ends, scale
        return out_TNV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TNV: Tensor) -> tuple[Tensor | None, ...]:
        q_TNQ, k_TNQ, v_TNV, out_TNV, logs_NT = ctx.saved_tensors
        return *causal_gradients(dout_TNV, q_TNQ, k_TNQ, v_TNV, out_TNV, logs_NT, ctx.ends, ctx.scale), None, None
