"""Multi-head latent attention, absorbed: queries are carried into latent space and meet the cache there.

With kv_b_proj viewed as [N, nope + v, C], W_UK = [:, :nope] and W_UV = [:, nope:]:
q~ = q_nope · W_UK, score = (q~ · c + q_rope · k_rope) · scale, z = sum p c, o = W_UV z.
Keys and values are never formed, and the cache holds the C + R numbers of a token alone.
Every token, of prompt or answer, takes this one path, so its bits are a function of its prefix alone.
Shapes: `T` tokens, `D` model, `N` heads, `C` latent, `R` rotary, `W` = C + R.
"""

import torch
from torch import Tensor

from attention.batch import StepBatch
from attention.cache import LatentCache
from attention.mla import LATENT_NORM_EPS, load_mla_weights
from kernels.attention import latent_attention
from kernels.heads import PackedHeads
from kernels.linear import PackedLinear
from kernels.norm import rms_norm
from kernels.rotary import rotate_heads, write_latents
from model.checkpoint import Checkpoint


class AbsorbedAttention:
    """The attention of one layer, for serving."""

    def __init__(self, checkpoint: Checkpoint, layer: int, dtype: torch.dtype, device: str) -> None:
        config = checkpoint.config
        weights = load_mla_weights(checkpoint, layer, None if device == "cpu" else dtype)  # kept narrow where they are
        self._config = config
        self._layer = layer
        if weights.q_proj is not None:
            self._q = PackedLinear(weights.q_proj.to(device))
        else:
            assert weights.q_a_proj is not None
            assert weights.q_a_layernorm is not None
            assert weights.q_b_proj is not None
            self._q_a = PackedLinear(weights.q_a_proj.to(device))
            self._q_a_norm = weights.q_a_layernorm.to(device, dtype, copy=True)
            self._q = PackedLinear(weights.q_b_proj.to(device))
        self._kv_a = PackedLinear(weights.kv_a_proj_with_mqa.to(device))
        self._kv_a_norm = weights.kv_a_layernorm.to(device, dtype, copy=True)
        kv_b = weights.kv_b_proj.view(config.num_attention_heads, -1, config.kv_lora_rank).to(device)
        up_key, up_value = kv_b.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        self._up_key = PackedHeads(up_key.transpose(1, 2))  # nope -> C
        self._up_value = PackedHeads(up_value)  # C -> v
        self._o = PackedLinear(weights.o_proj.to(device))

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: StepBatch, cache: LatentCache) -> Tensor:
        """Write this step's latents to the cache, attend, and project out: residual + attention, [T, D]."""
        config = self._config
        tokens, latent = x_TD.shape[0], config.kv_lora_rank
        layer_BSW = cache.layer(self._layer)
        kv_TW = self._kv_a(x_TD)
        write_latents(kv_TW, self._kv_a_norm, LATENT_NORM_EPS, batch.cos_TR, batch.sin_TR, batch.slot_T, layer_BSW)
        x_query = x_TD
        if config.q_lora_rank is not None:
            x_query = rms_norm(self._q_a(x_TD), self._q_a_norm, LATENT_NORM_EPS)
        q_TNQ = self._q(x_query).view(tokens, config.num_attention_heads, config.qk_head_dim)
        q_TNW = q_TNQ.new_empty(tokens, config.num_attention_heads, config.latent_width)
        self._up_key(q_TNQ[..., : config.qk_nope_head_dim], q_TNW[..., :latent])
        rotate_heads(q_TNQ, batch.cos_TR, batch.sin_TR, q_TNW)
        z_TNC = latent_attention(
            q_TNW,
            layer_BSW,
            batch.block_tables_QM,
            batch.sequence_T,
            batch.position_T,
            latent,
            config.softmax_scale,
        )
        return self._o(self._up_value(z_TNC).flatten(1), add=residual_TD)
