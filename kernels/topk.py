"""Softmax, then the best of all experts or of the best groups.

Shapes: `T` tokens, `E` experts, `G` groups, `K` chosen.
"""

import torch
from torch import Tensor

from kernels.native import check_dense, native_for, triton_serves


def softmax_top_k(
    logits_TE: Tensor, groups: int, kept_groups: int, top_k: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, K] int64 in falling order of affinity, ties to the lower index, and their weights fp32.

    Affinities are a softmax over all E. Where kept_groups < groups, only the experts of the groups with the largest
    single affinity are candidates; the others' affinities are set to 0. Weights are the affinities, normalised over
    the chosen or times `scale`; where a gradient is wanted, torch computes them.
    """
    native = native_for(logits_TE.device)
    differentiable = torch.is_grad_enabled() and logits_TE.requires_grad
    if triton_serves(logits_TE.device) and not differentiable:
        from kernels.gpu import topk

        return topk.softmax_top_k(logits_TE, groups, kept_groups, top_k, normalise, scale)
    if native is not None and not differentiable:
        tokens, experts = logits_TE.shape
        logits_TE = logits_TE.contiguous()
        check_dense(torch.float32, logits_TE)
        chosen_TK = torch.empty(tokens, top_k, dtype=torch.int64)
        weights_TK = torch.empty(tokens, top_k)
        native.shoal_route(
            logits_TE.data_ptr(),
            tokens,
            experts,
            groups,
            kept_groups,
            top_k,
            int(normalise),
            scale,
            chosen_TK.data_ptr(),
            weights_TK.data_ptr(),
        )
        return chosen_TK, weights_TK
    scores_TE = torch.softmax(logits_TE, dim=-1)
    if kept_groups < groups:
        scores_TE = _keep_best_groups(scores_TE, groups, kept_groups)
    ordered_TE, index_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    weights_TK = ordered_TE[:, :top_k]
    weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20) if normalise else weights_TK * scale
    return index_TE[:, :top_k].contiguous(), weights_TK.contiguous()


def _keep_best_groups(scores_TE: Tensor, groups: int, kept: int) -> Tensor:
    """Zero the affinities outside the `kept` groups whose best expert scores highest."""
    scores_TGE = scores_TE.unflatten(-1, (groups, -1))
    best_TG = scores_TGE.amax(dim=-1)
    chosen = best_TG.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    mask_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, chosen, True)
    return torch.where(mask_TG[..., None], scores_TGE, 0.0).flatten(1)
