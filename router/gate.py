"""The gate: which experts each token goes to, and with what weight. As released, in fp32.

Shapes: `T` tokens, `E` experts, `G` groups, `K` experts a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.topk import softmax_top_k
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
    limited = config.topk_method == "group_limited_greedy"
    experts_TK, weights_TK = softmax_top_k(
        logits_TE,
        groups=config.n_group if limited else 1,
        kept_groups=config.topk_group if limited else 1,
        top_k=config.num_experts_per_tok,
        normalise=config.norm_topk_prob and config.num_experts_per_tok > 1,
        scale=config.routed_scaling_factor,
    )
    return Routing(experts_TK, weights_TK)
