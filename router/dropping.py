"""Token dropping: in training, no device computes more than its average load (section 2.2.4, arXiv 2405.04434).

The paper's devices are the routing groups, whichever hosts hold them. Its budget is one of computation, which a token
costs once for each of its experts: what is counted, ranked and dropped are slots.
Shapes: `T` tokens, `K` experts a token, `N` slots (T · K, in the tokens' order), `G` groups.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Dropped:
    """Which slots stay. A dropped one adds nothing to its token's sum, and the other weights stay what they are."""

    keep_TK: Tensor  # bool
    slots: int  # there were
    dropped: int  # of them


def group_budget(slots: int, groups: int, capacity: float) -> int:
    """Slots a group may have: `capacity` times the average, rounded up, so that the evenest of loads loses nothing."""
    return math.ceil(capacity * slots / groups)


def drop_tokens(
    experts_TK: Tensor, affinity_TK: Tensor, protected_T: Tensor, config: ModelConfig, capacity: float = 1.0
) -> Dropped:
    """Drop each group's slots of lowest affinity, down to its budget; of two equal ones the later.

    experts_TK: int64, as the gate chose them. affinity_TK: floats in the order of the chosen affinities, as weights are
    unless they were normalised; gradients are not needed. protected_T: bool, the tokens of protected sequences. Their
    slots take up budget before all others and are never dropped: a group that has more of them than its budget keeps
    those and nothing else.

    The budget is the average over the slots that are given, and so depends on what is computed together. Where each
    worker drops from its own slots, a group gets at most the sum of their budgets, which is the average over all of
    them, but for rounding. With one group (V2-Lite) the average is the load: at capacity 1 or more nothing is dropped.

    Raises ValueError for a capacity that is not a finite number above 0, and for shapes that don't agree.
    """
    if not math.isfinite(capacity) or capacity <= 0:
        raise ValueError(f"capacity is {capacity}; expected a finite number above 0: 1 is the average load")
    if affinity_TK.shape != experts_TK.shape or protected_T.shape != experts_TK.shape[:1]:
        raise ValueError(
            f"experts are {tuple(experts_TK.shape)}, affinities {tuple(affinity_TK.shape)}, protected tokens "
            f"{tuple(protected_T.shape)}; expected [T, K], [T, K] and [T]"
        )
    groups = config.n_group
    group_N = experts_TK.flatten() // (config.n_routed_experts // groups)
    protected_N = protected_T.repeat_interleave(experts_TK.shape[1])
    rank_N = _rank(group_N, protected_N, affinity_TK.detach().flatten(), groups)
    keep_N = protected_N | (rank_N < group_budget(len(group_N), groups, capacity))
    return Dropped(keep_N.view_as(experts_TK), slots=len(keep_N), dropped=len(keep_N) - int(keep_N.sum()))


def protected_sequences(seed: int, step: int, first_sequence: int, count: int, share: float = 0.1) -> NDArray[np.bool_]:
    """Whether each of `count` sequences from `first_sequence` on is protected, which about `share` of all are.

    A function of the seed, the step and the number of the sequence among all of the step's (Philox 4x64-10): workers
    and micro-batches agree on it, whoever has the sequence. Raises ValueError for numbers out of range.
    """
    for name, value in (("seed", seed), ("step", step), ("first_sequence", first_sequence), ("count", count)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; expected 0 to 2^64 - 1")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected 0 to 1")
    philox = np.random.Philox(key=np.array([seed, step], np.uint64), counter=first_sequence)
    words = philox.random_raw(4 * count)[::4]  # four are drawn at each value of the counter
    return (words >> np.uint64(11)) * 2.0**-53 < share


def _rank(group_N: Tensor, protected_N: Tensor, affinity_N: Tensor, groups: int) -> Tensor:
    """Each slot's place among those of its group: protected ones first, then by falling affinity, then by number."""
    order_N = affinity_N.sort(descending=True, stable=True).indices
    class_N = group_N * 2 + ~protected_N
    order_N = order_N[class_N[order_N].sort(stable=True).indices]
    load_G = torch.bincount(group_N, minlength=groups)
    first_G = load_G.cumsum(0) - load_G
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device) - first_G[group_N[order_N]]
    return rank_N
