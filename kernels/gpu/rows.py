"""What is done row by row between the products: norms, rotation, and the weighted sum over slots.

A program has one row, or one token, and nothing of any other.
Shapes: `T` tokens, `N` heads, `D` model, `K` slots a token, `C` latent, `R` rotary dimensions, `W` = C + R.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.tiles import power_of_two

PLAIN = {"num_warps": 4, "enable_fp_fusion": False}
"""A compiler that fuses a product and a sum where it sees fit does not see the same everywhere."""


@triton.jit
def _normed(x, weight, eps, WIDTH: tl.constexpr):
    """x / sqrt(mean(x²) + eps) · weight, rounded as the plain kernel rounds."""
    wide = x.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    return weight * scaled.to(x.dtype)


@triton.jit
def _rms_norm(x, weight, out, x_row, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED)
    is_in = d < WIDTH
    read = tl.load(x + row * x_row + d, mask=is_in, other=0.0)
    made = _normed(read, tl.load(weight + d, mask=is_in, other=0.0), eps, WIDTH)
    tl.store(out + row * WIDTH + d, made.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _rotate_heads(
    q, cos, sin, out, heads, q_width, out_width, HALF: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, PADDED)[None, :]
    is_in = (n < heads) & (i < HALF)
    turn, lift = tl.load(cos + token * HALF + i, mask=i < HALF), tl.load(sin + token * HALF + i, mask=i < HALF)
    q_at = q + (token * heads + n) * q_width + q_width - 2 * HALF + 2 * i
    even, odd = tl.load(q_at, mask=is_in).to(tl.float32), tl.load(q_at + 1, mask=is_in).to(tl.float32)
    out_at = out + (token * heads + n) * out_width + out_width - 2 * HALF + 2 * i
    tl.store(out_at, (even * turn - odd * lift).to(out.dtype.element_ty), mask=is_in)
    tl.store(out_at + 1, (even * lift + odd * turn).to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _write_latents(
    kv,
    weight,
    cos,
    sin,
    slot,
    cache,
    kv_row,
    eps,
    LATENT: tl.constexpr,
    LATENTS: tl.constexpr,
    HALF: tl.constexpr,
    HALVES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    c, i = tl.arange(0, LATENTS), tl.arange(0, HALVES)
    to = cache + tl.load(slot + token) * (LATENT + 2 * HALF)
    latent = tl.load(kv + token * kv_row + c, mask=c < LATENT, other=0.0)
    made = _normed(latent, tl.load(weight + c, mask=c < LATENT, other=0.0), eps, LATENT)
    tl.store(to + c, made.to(cache.dtype.element_ty), mask=c < LATENT)
    turn, lift = tl.load(cos + token * HALF + i, mask=i < HALF), tl.load(sin + token * HALF + i, mask=i < HALF)
    at = kv + token * kv_row + LATENT + 2 * i
    even, odd = tl.load(at, mask=i < HALF).to(tl.float32), tl.load(at + 1, mask=i < HALF).to(tl.float32)
    tl.store(to + LATENT + 2 * i, (even * turn - odd * lift).to(cache.dtype.element_ty), mask=i < HALF)
    tl.store(to + LATENT + 2 * i + 1, (even * lift + odd * turn).to(cache.dtype.element_ty), mask=i < HALF)


@triton.jit
def _combine(
    answers,
    weights,
    shared,
    residual,
    out,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * PADDED + tl.arange(0, PADDED)
    is_in = d < WIDTH
    total = tl.load(weights + token * TOP_K) * tl.load(answers + token * TOP_K * WIDTH + d, mask=is_in, other=0.0)
    for slot in tl.static_range(1, TOP_K):
        answer = tl.load(answers + (token * TOP_K + slot) * WIDTH + d, mask=is_in, other=0.0)
        weight = tl.load(weights + token * TOP_K + slot)
        total += weight * answer
    if SHARED:
        total += tl.load(shared + token * WIDTH + d, mask=is_in, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + token * WIDTH + d, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + d, total.to(out.dtype.element_ty), mask=is_in)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.norm.rms_norm`."""
    width = x.shape[-1]
    x_RD = x.reshape(-1, width)
    assert x_RD.stride(1) == 1
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    if x_RD.shape[0]:
        _rms_norm[(x_RD.shape[0],)](
            x_RD,
            weight,
            out,
            x_RD.stride(0),
            eps,
            WIDTH=width,
            PADDED=power_of_two(width),
            **PLAIN,
        )
    return out


def rotate_heads(q_TNQ: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_TNW: Tensor) -> None:
    """As `kernels.rotary.rotate_heads`."""
    tokens, heads, width = q_TNQ.shape
    half = cos_TR.shape[1]
    assert q_TNQ.is_contiguous()
    assert out_TNW.is_contiguous()
    assert cos_TR.is_contiguous()
    assert sin_TR.is_contiguous()
    if tokens:
        _rotate_heads[(tokens,)](
            q_TNQ,
            cos_TR,
            sin_TR,
            out_TNW,
            heads,
            width,
            out_TNW.shape[2],
            HALF=half,
            HEADS=power_of_two(heads),
            PADDED=power_of_two(half),
            **PLAIN,
        )


def write_latents(
    kv_TW: Tensor, weight_C: Tensor, eps: float, cos_TR: Tensor, sin_TR: Tensor, slot_T: Tensor, cache_BSW: Tensor
) -> None:
    """As `kernels.rotary.write_latents`."""
    latent, half = weight_C.shape[0], cos_TR.shape[1]
    assert kv_TW.stride(1) == 1
    assert cache_BSW.is_contiguous()
    assert cos_TR.is_contiguous()
    assert sin_TR.is_contiguous()
    if kv_TW.shape[0]:
        _write_latents[(kv_TW.shape[0],)](
            kv_TW,
            weight_C,
            cos_TR,
            sin_TR,
            slot_T,
            cache_BSW,
            kv_TW.stride(0),
            eps,
            LATENT=latent,
            LATENTS=power_of_two(latent),
            HALF=half,
            HALVES=power_of_two(half),
            **PLAIN,
        )


def combine(
    answer_SD: Tensor,
    weights_TK: Tensor,
    shared_TD: Tensor | None,
    residual_TD: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """residual + (Σ_k weight[t, k] · answer[t · K + k], summed in rising k, + shared), [T, D] of `dtype`."""
    tokens, top_k = weights_TK.shape
    width = answer_SD.shape[1]
    out_TD = torch.empty(tokens, width, dtype=dtype, device=answer_SD.device)
    assert answer_SD.is_contiguous()
    weights_TK = weights_TK.contiguous()
    shared_TD = None if shared_TD is None else shared_TD.contiguous()
    residual_TD = None if residual_TD is None else residual_TD.contiguous()
    part = min(1024, power_of_two(width))
    if tokens:
        _combine[(tokens, -(-width // part))](
            answer_SD,
            weights_TK,
            out_TD if shared_TD is None else shared_TD,
            out_TD if residual_TD is None else residual_TD,
            out_TD,
            WIDTH=width,
            PADDED=part,
            TOP_K=top_k,
            SHARED=shared_TD is not None,
            RESIDUAL=residual_TD is not None,
            **PLAIN,
        )
    return out_TD
