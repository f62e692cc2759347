"""Heads are rotated in place of wider ones, and latents reach their slots."""

import torch

from kernels.norm import rms_norm
from kernels.rotary import rotate, rotate_heads, write_latents

TOKENS, HEADS, NOPE, ROTARY, LATENT = 11, 3, 5, 8, 21


def turns() -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(TOKENS, ROTARY // 2, generator=torch.Generator().manual_seed(1))
    return angles.cos(), angles.sin()


def test_a_rotation_is_a_complex_product() -> None:
    cos, sin = turns()
    x = torch.randn(TOKENS, ROTARY)
    product = torch.view_as_complex(x.view(TOKENS, -1, 2)) * torch.complex(cos, sin)
    assert torch.allclose(rotate(x, cos, sin), torch.view_as_real(product).flatten(1), atol=1e-6)


def test_only_the_last_numbers_of_each_head_are_written() -> None:
    cos, sin = turns()
    q = torch.randn(TOKENS, HEADS, NOPE + ROTARY)
    out = torch.full((TOKENS, HEADS, LATENT + ROTARY), 7.0)
    rotate_heads(q, cos, sin, out)
    assert torch.allclose(out[..., LATENT:], rotate(q[..., NOPE:], cos[:, None], sin[:, None]), atol=1e-6)
    assert (out[..., :LATENT] == 7.0).all()


def test_latents_are_normalised_and_keys_rotated_into_their_slots() -> None:
    cos, sin = turns()
    kv = torch.randn(TOKENS, LATENT + ROTARY)
    weight = torch.rand(LATENT)
    cache = torch.full((6, 4, LATENT + ROTARY), 7.0)
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(2))[:TOKENS]
    write_latents(kv, weight, 1e-6, cos, sin, slots, cache)
    flat = cache.flatten(0, 1)
    assert torch.allclose(flat[slots, :LATENT], rms_norm(kv[:, :LATENT], weight, 1e-6), atol=1e-6)
    assert torch.allclose(flat[slots, LATENT:], rotate(kv[:, LATENT:], cos, sin), atol=1e-6)
    untouched = [slot for slot in range(24) if slot not in slots.tolist()]
    assert (flat[untouched] == 7.0).all()
