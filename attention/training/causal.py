"""Causal attention of samples laid flat: those of like lengths side by side, each to itself alone.

Shapes: `T` tokens, `N` heads, `Q` query and key width, `V` value width, `S` samples of a group, `L` their longest.
"""

import itertools
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class SampleGroups:
    """Samples of a micro-batch, grouped so that the lengths of a group differ by less than twice.

    A shorter sample is filled up with its last token: those keys come after all of its own queries, which see none of
    them.
    """

    def __init__(self, shape: tuple[int, int] | None, groups: Sequence[tuple[Tensor, Tensor]]) -> None:
        """`shape` is [S, L] where all samples are of one length, and then there are no groups.

        A group is the token at each place, int64 [S, L], and whether it is not there to fill up, bool [S, L].
        """
        self._shape = shape
        self._groups = groups
        self._place_T = None if shape else torch.cat([index_SL[own_SL] for index_SL, own_SL in groups]).argsort()

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Self:
        """`lengths` in the order in which the samples lie."""
        if len(set(lengths)) == 1:
            return cls((len(lengths), lengths[0]), ())
        starts = [0, *itertools.accumulate(lengths)]
        by_size: dict[int, list[int]] = {}
        for sample, length in enumerate(lengths):
            by_size.setdefault(length.bit_length(), []).append(sample)
        groups: list[tuple[Tensor, Tensor]] = []
        for samples in by_size.values():
            length_S1 = torch.tensor([[lengths[sample]] for sample in samples], device=device)
            start_S1 = torch.tensor([[starts[sample]] for sample in samples], device=device)
            place_L = torch.arange(int(length_S1.max()), device=device)
            groups.append((start_S1 + place_L.minimum(length_S1 - 1), place_L < length_S1))
        return cls(None, groups)

    def attend(self, q_TNQ: Tensor, k_TNQ: Tensor, v_TNV: Tensor, scale: float) -> Tensor:
        """softmax(scale · q kᵀ, causal) v of each sample, [T, N, V]."""
        if self._place_T is None:
            assert self._shape is not None
            q, k, v = (one.unflatten(0, self._shape) for one in (q_TNQ, k_TNQ, v_TNV))
            return _attend(q, k, v, scale).flatten(0, 1)
        outs: list[Tensor] = []
        for index_SL, own_SL in self._groups:
            flat = index_SL.flatten()
            q, k, v = (one.index_select(0, flat).unflatten(0, index_SL.shape) for one in (q_TNQ, k_TNQ, v_TNV))
            outs.append(_attend(q, k, v, scale)[own_SL])
        return torch.cat(outs).index_select(0, self._place_T)


def _attend(q_SLNQ: Tensor, k_SLNQ: Tensor, v_SLNV: Tensor, scale: float) -> Tensor:
    values = v_SLNV.shape[-1]
    q, k, v = (one.transpose(1, 2) for one in (q_SLNQ, k_SLNQ, v_SLNV))
    if q.device.type == "cpu":  # torch has a kernel that forms no samples' whole scores, if all are of one width
        width = max(q.shape[-1], values)
        q, k, v = (one if one.shape[-1] == width else F.pad(one, (0, width - one.shape[-1])) for one in (q, k, v))
    out_SNLV = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :values]
    return out_SNLV.transpose(1, 2)
