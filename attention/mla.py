"""Multi-head latent attention, expanded: keys and values are formed from the latents (eqs 9-19).

The plain form of whole sequences, which the absorbed form in `absorbed.py` equals; training has its own, of samples.
Shapes: `B` sequences, `T` tokens, `D` model, `N` heads, `C` latent (kv_lora_rank), `R` rotary dimensions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from attention.rope import RotaryTable
from kernels.rotary import rotate
from model.checkpoint import Checkpoint
from model.config import ModelConfig

LATENT_NORM_EPS = 1e-6  # both latent norms, whatever rms_norm_eps says (released code)


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """One layer's attention tensors under their checkpoint names, [out, in]."""

    q_proj: Tensor | None  # [N·(nope + R), D] when there is no query compression
    q_a_proj: Tensor | None  # [q_lora_rank, D]
    q_a_layernorm: Tensor | None  # [q_lora_rank]
    q_b_proj: Tensor | None  # [N·(nope + R), q_lora_rank]
    kv_a_proj_with_mqa: Tensor  # [C + R, D]
    kv_a_layernorm: Tensor  # [C]
    kv_b_proj: Tensor  # [N·(nope + v), C]
    o_proj: Tensor  # [D, N·v]


def load_mla_weights(checkpoint: Checkpoint, layer: int, dtype: torch.dtype | None = torch.float32) -> MlaWeights:
    """Read one layer's attention tensors as `dtype`, or each in its own."""

    def read(name: str) -> Tensor:
        return checkpoint.tensor(f"model.layers.{layer}.self_attn.{name}.weight").to(dtype=dtype)

    compressed = checkpoint.config.q_lora_rank is not None
    return MlaWeights(
        q_proj=None if compressed else read("q_proj"),
        q_a_proj=read("q_a_proj") if compressed else None,
        q_a_layernorm=read("q_a_layernorm") if compressed else None,
        q_b_proj=read("q_b_proj") if compressed else None,
        kv_a_proj_with_mqa=read("kv_a_proj_with_mqa"),
        kv_a_layernorm=read("kv_a_layernorm"),
        kv_b_proj=read("kv_b_proj"),
        o_proj=read("o_proj"),
    )


def expanded_attention(
    weights: MlaWeights, config: ModelConfig, x_BTD: Tensor, rotary: RotaryTable, first_position: int = 0
) -> Tensor:
    """Causal attention of whole sequences, [B, T, D] -> [B, T, D], without a cache (eqs 37-47)."""
    batch, tokens, _ = x_BTD.shape
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    positions = torch.arange(first_position, first_position + tokens, device=x_BTD.device)
    cos, sin = rotary.at(positions)

    if weights.q_proj is not None:
        q = F.linear(x_BTD, weights.q_proj)
    else:
        assert weights.q_a_proj is not None
        assert weights.q_a_layernorm is not None
        assert weights.q_b_proj is not None
        latent_query = _latent_norm(F.linear(x_BTD, weights.q_a_proj), weights.q_a_layernorm)
        q = F.linear(latent_query, weights.q_b_proj)
    q_BTNQ = q.view(batch, tokens, heads, config.qk_head_dim)
    q_nope, q_rope = q_BTNQ.split((nope, config.qk_rope_head_dim), dim=-1)
    q_rope = rotate(q_rope, cos[:, None], sin[:, None])

    latent_BTC, k_rope = F.linear(x_BTD, weights.kv_a_proj_with_mqa).split(
        (config.kv_lora_rank, config.qk_rope_head_dim), dim=-1
    )
    latent_BTC = _latent_norm(latent_BTC, weights.kv_a_layernorm)
    k_rope = rotate(k_rope, cos, sin)[:, :, None].expand(-1, -1, heads, -1)
    kv = F.linear(latent_BTC, weights.kv_b_proj).view(batch, tokens, heads, nope + config.v_head_dim)
    k_nope, v = kv.split((nope, config.v_head_dim), dim=-1)

    query = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
    key = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, key, v.transpose(1, 2), is_causal=True, scale=config.softmax_scale)
    return F.linear(out.transpose(1, 2).flatten(2), weights.o_proj)


def _latent_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), LATENT_NORM_EPS).to(x.dtype)
