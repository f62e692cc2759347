"""Softmax, then the best of all experts or of the best groups; a program has one token.

Shapes: `T` tokens, `E` experts, `K` chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.tiles import power_of_two


@triton.jit
def _route(
    logits,
    chosen,
    weights,
    logits_row,
    scale,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    g, i = tl.arange(0, PADDED_GROUPS), tl.arange(0, PADDED_SIZE)
    expert = g[:, None] * SIZE + i[None, :]
    is_in = (g[:, None] < GROUPS) & (i[None, :] < SIZE)
    logit = tl.load(logits + token * logits_row + expert, mask=is_in, other=-float("inf"))
    raised = tl.exp(logit - tl.max(tl.max(logit, axis=1), axis=0))
    score = raised / tl.sum(tl.sum(raised, axis=1), axis=0)
    if KEPT < GROUPS:
        best = tl.where(g < GROUPS, tl.max(score, axis=1), -1.0)
        kept = g < 0
        for _ in tl.static_range(KEPT):
            highest = tl.max(best, axis=0)
            pick = tl.min(tl.where(best == highest, g, PADDED_GROUPS), axis=0)
            kept = kept | (g == pick)
            best = tl.where(g == pick, -2.0, best)
        score = tl.where(kept[:, None], score, 0.0)
    score = tl.where(is_in, score, -1.0)
    k = tl.arange(0, PADDED_K)
    picked = tl.zeros((PADDED_K,), dtype=tl.int64)
    affinity = tl.zeros((PADDED_K,), dtype=tl.float32)
    total = 0.0
    for slot in tl.static_range(TOP_K):
        highest = tl.max(tl.max(score, axis=1), axis=0)
        lowest = tl.where(score == highest, expert, GROUPS * SIZE)  # of equals
        pick = tl.minimum(tl.min(tl.min(lowest, axis=1), axis=0), GROUPS * SIZE - 1)  # of no numbers, the last
        picked = tl.where(k == slot, pick.to(tl.int64), picked)
        affinity = tl.where(k == slot, highest, affinity)
        total += highest
        score = tl.where(expert == pick, -2.0, score)
    affinity = affinity / (total + 1e-20) if NORMALISE else affinity * scale
    tl.store(chosen + token * TOP_K + k, picked, mask=k < TOP_K)
    tl.store(weights + token * TOP_K + k, affinity, mask=k < TOP_K)


def softmax_top_k(
    logits_TE: Tensor, groups: int, kept_groups: int, top_k: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As `kernels.topk.softmax_top_k`, without a gradient."""
    tokens, experts = logits_TE.shape
    assert logits_TE.dtype == torch.float32
    assert logits_TE.stride(1) == 1
    if kept_groups >= groups:
        groups = kept_groups = 1
    chosen_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(tokens, top_k, device=logits_TE.device)
    if tokens:
        _route[(tokens,)](
            logits_TE,
            chosen_TK,
            weights_TK,
            logits_TE.stride(0),
            scale,
            GROUPS=groups,
            SIZE=experts // groups,
            KEPT=kept_groups,
            TOP_K=top_k,
            NORMALISE=normalise,
            PADDED_GROUPS=power_of_two(groups),
            PADDED_SIZE=power_of_two(experts // groups),
            PADDED_K=power_of_two(top_k),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return chosen_TK, weights_TK
