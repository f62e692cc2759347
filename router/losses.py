"""Losses that pull the gate towards an even load, and how uneven a load is (section 2.2.3, arXiv 2405.04434).

The paper's devices are the routing groups, whichever hosts hold them.
Shapes: `T` tokens, `S` sequences, `E` experts, `G` groups, `K` experts a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class BalanceCoefficients:
    """α1, α2 and α3; 0 leaves a loss out. V2: 0.003, 0.05, 0.02; V2-Lite: 0.001, 0, 0.

    Raises ValueError naming the one that is no finite number of at least 0.
    """

    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0

    def __post_init__(self) -> None:
        for name in ("expert", "device", "communication"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"balance coefficient {name} is {value}; expected a finite number of at least 0")

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError naming a coefficient whose loss this model doesn't have."""
        for name in ("device", "communication"):
            value = getattr(self, name)
            if value and config.n_group == 1:
                raise ValueError(
                    f"balance coefficient {name} is {value}, but the model routes all its experts as one group "
                    f"(n_group is 1), between which nothing can be balanced: set {name} to 0"
                )


@dataclass(frozen=True, slots=True)
class BalanceLosses:
    """Scalars of the scores' dtype, times their coefficients, each summed over the sequences of the batch.

    A step's loss is the sum over layers, micro-batches and workers, over the number of the step's sequences: it
    does not depend on which of them were computed together.
    """

    expert: Tensor
    device: Tensor
    communication: Tensor
    sequences: int

    @property
    def total(self) -> Tensor:
        return self.expert + self.device + self.communication


@dataclass(frozen=True, slots=True)
class Imbalance:
    """The largest load over the mean one; 1 is even, and what is said where there is no load."""

    expert: float
    device: float


@dataclass(frozen=True, slots=True)
class _Segments:
    """Which sequence each token is of, and how many tokens each sequence has."""

    sequence_T: Tensor  # int64
    tokens_S: Tensor  # int64

    def mean(self, total_SX: Tensor, dtype: torch.dtype) -> Tensor:
        """Of a sum over each sequence's tokens."""
        return total_SX.to(dtype) / self.tokens_S[:, None]


def gate_scores(logits_TE: Tensor) -> Tensor:
    """Affinities [T, E] fp32 over all experts, no group masked, with their gradient; `route` takes the same logits."""
    if logits_TE.dtype != torch.float32:
        raise ValueError(f"gate logits are {logits_TE.dtype}; expected float32: the gate is never computed below")
    return torch.softmax(logits_TE, dim=-1)


def balance_losses(
    scores_TE: Tensor,
    experts_TK: Tensor,
    segment_ends: Sequence[int],
    config: ModelConfig,
    coefficients: BalanceCoefficients,
) -> BalanceLosses:
    """Expert, device and communication balance loss of a layer's packed sequences (eqs 23-31).

    scores_TE: fp32 affinities over all experts, none masked; the only place that gradients flow to. experts_TK: int64,
    as the gate chose them, before any is dropped. segment_ends[s]: one past the last token of sequence s. With F the
    share of a sequence's tokens that chose an expert, or reach a group, and P the sequence's mean score:

    expert         α1 · Σ_e f_e P_e      f_e = E/K · F_e
    device         α2 · Σ_g f'_g P'_g    f'_g = mean of f over the group, P'_g = sum of P over it
    communication  α3 · Σ_g f''_g P'_g   f''_g = G/topk_group · F_g, a token that chose several of a group counted once

    Raises ValueError for scores below fp32, ends that don't rise to T, and a coefficient that the model has no use for.
    """
    coefficients.check(config)
    if scores_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores are {scores_TE.dtype}; expected float32: the gate is never computed below")
    experts, groups = config.n_routed_experts, config.n_group
    segments = _segments(segment_ends, scores_TE)
    scores_TG = scores_TE.unflatten(-1, (groups, -1)).sum(-1)
    chosen_SE = _chosen(segments, experts_TK, experts)
    reached_SG = _reached(segments, experts_TK // (experts // groups), groups)
    f_SE = segments.mean(chosen_SE, scores_TE.dtype) * (experts / config.num_experts_per_tok)
    f_device_SG = f_SE.unflatten(-1, (groups, -1)).mean(-1)
    f_communication_SG = segments.mean(reached_SG, scores_TE.dtype) * (groups / config.topk_group)
    return BalanceLosses(
        expert=coefficients.expert * _sum_f_p(segments, f_SE, scores_TE),
        device=coefficients.device * _sum_f_p(segments, f_device_SG, scores_TG),
        communication=coefficients.communication * _sum_f_p(segments, f_communication_SG, scores_TG),
        sequences=len(segment_ends),
    )


def load_imbalance(rows_E: Sequence[int], config: ModelConfig) -> Imbalance:
    """From how many rows each of a layer's experts got, which add up over micro-batches and workers (LoadMeter)."""
    size = config.n_routed_experts // config.n_group
    rows_G = [sum(rows_E[first : first + size]) for first in range(0, config.n_routed_experts, size)]
    return Imbalance(expert=_largest_over_mean(rows_E), device=_largest_over_mean(rows_G))


def _largest_over_mean(rows: Sequence[int]) -> float:
    total = sum(rows)
    return max(rows) * len(rows) / total if total else 1.0


def _segments(ends: Sequence[int], scores_TE: Tensor) -> _Segments:
    tokens = len(scores_TE)
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    if sum(lengths) != tokens or min(lengths, default=1) < 1:
        raise ValueError(f"segment_ends is {list(ends)}; expected rising ends, the last of them {tokens}, the tokens")
    tokens_S = torch.tensor(lengths, dtype=torch.int64, device=scores_TE.device)
    sequence_S = torch.arange(len(lengths), device=scores_TE.device)
    return _Segments(sequence_S.repeat_interleave(tokens_S, output_size=tokens), tokens_S)


def _chosen(segments: _Segments, experts_TK: Tensor, experts: int) -> Tensor:
    """[S, E], how many tokens of each sequence chose each expert."""
    sequences = len(segments.tokens_S)
    cell_TK = segments.sequence_T[:, None] * experts + experts_TK
    return torch.bincount(cell_TK.flatten(), minlength=sequences * experts).view(sequences, experts)


def _reached(segments: _Segments, group_TK: Tensor, groups: int) -> Tensor:
    """[S, G], how many tokens of each sequence have a slot in each group, or several."""
    reached_TG = torch.zeros(len(group_TK), groups, dtype=torch.int64, device=group_TK.device)
    reached_TG.scatter_(1, group_TK, 1)
    counts_SG = torch.zeros(len(segments.tokens_S), groups, dtype=torch.int64, device=group_TK.device)
    return counts_SG.index_add_(0, segments.sequence_T, reached_TG)


def _sum_f_p(segments: _Segments, f_SX: Tensor, scores_TX: Tensor) -> Tensor:
    """Sum over sequences and X of f · P, where P is the mean of the sequence's scores.

    P is linear in the scores, so each of them is weighted with its sequence's f over its length: no floats are
    scattered, which a GPU would add up in any order.
    """
    weight_SX = segments.mean(f_SX, scores_TX.dtype)
    return (weight_SX[segments.sequence_T] * scores_TX).sum()
