"""Latent attention with gradients over samples laid flat, expanded (eqs 9-19): each token sees its own sample alone.

Shapes: `T` tokens, `D` model, `N` heads, `C` latent, `R` rotary dimensions, `Q` = nope + R.
"""

import torch
from torch import Tensor

from attention.mla import LATENT_NORM_EPS
from attention.training.causal import SampleGroups
from attention.training.norm import norm
from attention.training.parameters import DenseParameters
from kernels.rotary import rotate
from model.config import ModelConfig


def segment_attention(
    dense: DenseParameters,
    config: ModelConfig,
    layer: int,
    x_TD: Tensor,
    rotation: tuple[Tensor, Tensor],
    samples: SampleGroups,
) -> Tensor:
    """Causal attention of each sample, [T, D] -> [T, D]; `rotation` is cos and sin of every token."""
    prefix = f"model.layers.{layer}.self_attn"
    tokens, heads, nope = len(x_TD), config.num_attention_heads, config.qk_nope_head_dim
    cos, sin = rotation
    if config.q_lora_rank is None:
        q = dense.linear(f"{prefix}.q_proj", x_TD)
    else:
        compressed = norm(
            dense.linear(f"{prefix}.q_a_proj", x_TD), dense[f"{prefix}.q_a_layernorm.weight"], LATENT_NORM_EPS
        )
        q = dense.linear(f"{prefix}.q_b_proj", compressed)
    q_nope, q_rope = q.view(tokens, heads, config.qk_head_dim).split((nope, config.qk_rope_head_dim), dim=-1)
    q_TNQ = torch.cat((q_nope, rotate(q_rope, cos[:, None], sin[:, None])), dim=-1)

    latent, k_rope = dense.linear(f"{prefix}.kv_a_proj_with_mqa", x_TD).split(
        (config.kv_lora_rank, config.qk_rope_head_dim), dim=-1
    )
    latent_TC = norm(latent, dense[f"{prefix}.kv_a_layernorm.weight"], LATENT_NORM_EPS)
    kv_TNK = dense.linear(f"{prefix}.kv_b_proj", latent_TC).view(tokens, heads, nope + config.v_head_dim)
    k_nope, v_TNV = kv_TNK.split((nope, config.v_head_dim), dim=-1)
    k_rope_TNR = rotate(k_rope, cos, sin)[:, None].expand(-1, heads, -1)
    k_TNQ = torch.cat((k_nope, k_rope_TNR), dim=-1)

    out_TNV = samples.attend(q_TNQ, k_TNQ, v_TNV, config.softmax_scale)
    return dense.linear(f"{prefix}.o_proj", out_TNV.flatten(1))
