"""Causal attention of samples laid flat: those of like lengths side by side, each to itself alone.

Shapes: `T` tokens, `N` heads, `Q` query and key width, `V` value width, `S` samples of a group, `L` their longest.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

SCORES = 1 << 22  # that one call may form, where that is more than one sample


def causal_attention(q_TNQ: Tensor, k_TNQ: Tensor, v_TNV: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """softmax(scale · q kᵀ, causal) v of each sample, [T, N, V].

    A group's lengths differ by less than twice. A shorter sample is filled up with its last token: those keys come
    after all of its own queries, which see none of them.
    """
    if len(set(lengths)) == 1:
        shape = len(lengths), lengths[0]
        q, k, v = (one.unflatten(0, shape) for one in (q_TNQ, k_TNQ, v_TNV))
        return _attend(q, k, v, scale).flatten(0, 1)
    outs: list[Tensor] = []
    places: list[Tensor] = []
    for index_SL, own_SL in _groups(lengths, q_TNQ.device):
        flat = index_SL.flatten()
        q, k, v = (one.index_select(0, flat).unflatten(0, index_SL.shape) for one in (q_TNQ, k_TNQ, v_TNV))
        outs.append(_attend(q, k, v, scale)[own_SL])
        places.append(index_SL[own_SL])
    return torch.cat(outs).index_select(0, torch.cat(places).argsort())


def _attend(q_SLNQ: Tensor, k_SLNQ: Tensor, v_SLNV: Tensor, scale: float) -> Tensor:
    _, length, heads, _ = q_SLNQ.shape
    together = max(1, SCORES // (heads * length * length))
    outs: list[Tensor] = []
    parts = zip(*(one.transpose(1, 2).split(together) for one in (q_SLNQ, k_SLNQ, v_SLNV)), strict=True)
    for q, k, v in parts:
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).transpose(1, 2)


def _groups(lengths: Sequence[int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Of each group, the token at each place, int64 [S, L], and whether it is not there to fill up, bool [S, L]."""
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
    return groups
