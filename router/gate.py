"""The gate: which experts each token goes to, and with what weight. As released, in fp32.

Shapes: `T` tokens, `E` experts, `G` groups, `K` experts a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Routing:
    """A token's slots in order of falling affinity."""

    experts_TK: Tensor  # int64
    weights_TK: Tensor  # fp32


def route(logits_TE: Tensor, config: ModelConfig) -> Routing:
    """Choose experts from gate logits [T, E] (section 2.2.2; matches transformers' deepseek_v2).

    Affinities are a softmax over all experts. `greedy` takes the K largest. `group_limited_greedy` first keeps
    the topk_group groups with the largest single affinity and sets the rest to 0. Chosen affinities are not
    renormalised but scaled, unless norm_topk_prob: then normalised and not scaled. Ties go to the lower index.
    """
    if logits_TE.dtype != torch.float32:
        raise ValueError(f"gate logits are {logits_TE.dtype}; expected float32: the gate is never computed below")
    scores_TE = torch.softmax(logits_TE, dim=-1)
    if config.topk_method == "group_limited_greedy":
        scores_TE = _keep_best_groups(scores_TE, config.n_group, config.topk_group)
    ordered_TE, index_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    weights_TK = ordered_TE[:, : config.num_experts_per_tok]
    experts_TK = index_TE[:, : config.num_experts_per_tok].contiguous()
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    else:
        weights_TK = weights_TK * config.routed_scaling_factor
    return Routing(experts_TK, weights_TK.contiguous())


def _keep_best_groups(scores_TE: Tensor, groups: int, kept: int) -> Tensor:
    """Zero the affinities outside the `kept` groups whose best expert scores highest."""
    scores_TGE = scores_TE.unflatten(-1, (groups, -1))
    best_TG = scores_TGE.amax(dim=-1)
    chosen = best_TG.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    mask_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, chosen, True)
    return torch.where(mask_TG[..., None], scores_TGE, 0.0).flatten(1)
