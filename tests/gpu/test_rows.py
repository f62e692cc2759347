"""Row by row work against the plain kernels, which are held to float64 and to transformers elsewhere."""

import pytest
import torch

from kernels import combine as plain_combine
from kernels import rotary, topk
from kernels.gpu import rows
from kernels.gpu import topk as routing
from tests.gpu.errors import close


def test_norm(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(7, 3, 72, generator=generator).to(device, dtype)
    weight = torch.randn(72, generator=generator).to(device, dtype)
    out = rows.rms_norm(x[:, 1], weight, 1e-6)
    assert out.dtype == dtype
    wide = x[:, 1].double()
    close(out, weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6), dtype)


def test_rotation_and_the_way_into_the_cache(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(10)
    angles = torch.randn(5, 3, generator=generator)
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    q = torch.randn(5, 4, 14, generator=generator).to(device, dtype)
    out = torch.zeros(5, 4, 20, dtype=dtype, device=device)
    rows.rotate_heads(q, cos, sin, out)
    expected = torch.zeros_like(out)
    expected[..., -6:] = rotary.rotate(q[..., -6:], cos[:, None], sin[:, None])
    close(out, expected, dtype)

    kv = torch.randn(5, 18, generator=generator).to(device, dtype)
    weight = torch.randn(12, generator=generator).to(device, dtype)
    slot = torch.tensor([9, 0, 4, 11, 3], device=device)
    cache = torch.zeros(3, 4, 18, dtype=dtype, device=device)
    rows.write_latents(kv, weight, 1e-6, cos, sin, slot, cache)
    expected = torch.zeros(12, 18, dtype=dtype, device=device)
    wide = kv[:, :12].double()
    expected[slot, :12] = (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6))).to(dtype)
    expected[slot, 12:] = rotary.rotate(kv[:, 12:], cos, sin)
    close(cache.view(12, 18), expected, dtype)


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "top_k"), [(8, 1, 1, 3), (20, 4, 2, 6), (12, 3, 3, 4), (20, 4, 1, 5)]
)
@pytest.mark.parametrize("normalise", [False, True])
def test_routing_is_the_plain_kernels(
    device: str, experts: int, groups: int, kept: int, top_k: int, normalise: bool
) -> None:
    logits = torch.randn(9, experts, generator=torch.Generator().manual_seed(11))
    logits[3] = 0.5  # all alike
    logits[4, experts // 2 :] = logits[4, : experts - experts // 2]
    expected, weights = topk.softmax_top_k(logits, groups, kept, top_k, normalise, 2.5)
    chosen, found = routing.softmax_top_k(logits.to(device), groups, kept, top_k, normalise, 2.5)
    assert torch.equal(chosen.cpu(), expected)
    torch.testing.assert_close(found.cpu(), weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("added", [False, True])
def test_slots_are_summed(device: str, dtype: torch.dtype, added: bool) -> None:
    generator = torch.Generator().manual_seed(12)
    answers = torch.randn(4 * 3, 50, generator=generator).to(device)
    weights = torch.rand(4, 3, generator=generator).to(device)
    shared = torch.randn(4, 50, generator=generator).to(device, dtype) if added else None
    residual = torch.randn(4, 50, generator=generator).to(device, dtype) if added else None
    out = rows.combine(answers, weights, shared, residual, dtype)
    assert out.dtype == dtype
    slots = torch.arange(12, device=device)
    plainly = plain_combine._combine_plainly([(slots, answers)], weights, 50, shared, residual)
    close(out, plainly, dtype)
