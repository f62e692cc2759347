"""Rotary embedding of interleaved pairs, and the latents' way into the cache.

Shapes: `T` tokens, `N` heads, `C` latent, `R` rotary dimensions, `W` = C + R, cos and sin [T, R / 2].
"""

import torch
from torch import Tensor

from kernels.native import check_dense, native_for, triton_serves
from kernels.norm import rms_norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2i, 2i + 1) of x [..., R]; cos and sin broadcast against [..., R / 2].

    Equals multiplying complex numbers x[2i] + j·x[2i+1] by cos + j·sin, as the released code does.
    """
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rotate_heads(q_TNQ: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_TNW: Tensor) -> None:
    """Rotate the last R numbers of every head's query into the last R of `out_TNW`; both are contiguous."""
    rotary = 2 * cos_TR.shape[1]
    native = native_for(q_TNQ.device)
    if triton_serves(q_TNQ.device):
        from kernels.gpu import rows as on_gpu

        on_gpu.rotate_heads(q_TNQ, cos_TR, sin_TR, out_TNW)
        return
    if native is None:
        out_TNW[..., -rotary:] = rotate(q_TNQ[..., -rotary:], cos_TR[:, None], sin_TR[:, None])
        return
    check_dense(torch.float32, q_TNQ, cos_TR, sin_TR, out_TNW)
    tokens, heads, width = q_TNQ.shape
    assert cos_TR.shape == sin_TR.shape == (tokens, rotary // 2)
    assert out_TNW.shape[:2] == (tokens, heads)
    native.shoal_rotate_heads(
        q_TNQ.data_ptr(),
        width,
        tokens,
        heads,
        rotary,
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        out_TNW.data_ptr(),
        out_TNW.shape[2],
    )


def write_latents(
    kv_TW: Tensor, weight_C: Tensor, eps: float, cos_TR: Tensor, sin_TR: Tensor, slot_T: Tensor, cache_BSW: Tensor
) -> None:
    """Normalise the first C numbers of each row, rotate the last R, and put the row into its slot of the cache."""
    latent = weight_C.shape[0]
    native = native_for(kv_TW.device)
    if triton_serves(kv_TW.device):
        from kernels.gpu import rows as on_gpu

        on_gpu.write_latents(kv_TW, weight_C, eps, cos_TR, sin_TR, slot_T, cache_BSW)
        return
    if native is None:
        latent_TC, k_rope_TR = kv_TW.split((latent, kv_TW.shape[1] - latent), dim=1)
        rows = (rms_norm(latent_TC, weight_C, eps), rotate(k_rope_TR, cos_TR, sin_TR))
        cache_BSW.flatten(0, 1)[slot_T] = torch.cat(rows, dim=1).to(cache_BSW.dtype)
        return
    check_dense(torch.float32, kv_TW, weight_C, cos_TR, sin_TR, cache_BSW)
    check_dense(torch.int64, slot_T)
    tokens, width = kv_TW.shape
    assert slot_T.shape == (tokens,)
    assert cos_TR.shape == sin_TR.shape == (tokens, (width - latent) // 2)
    assert cache_BSW.shape[2] == width
    native.shoal_write_latents(
        kv_TW.data_ptr(),
        width,
        weight_C.data_ptr(),
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        slot_T.data_ptr(),
        tokens,
        latent,
        width - latent,
        eps,
        cache_BSW.data_ptr(),
    )
