"""silu(gate) · up and its gradients against autograd's in float64, and that a row's bits are its own."""

import pytest
import torch
from torch import Tensor

from kernels.gated import gated, gated_gradients, weighted_gradients
from kernels.native import native_serves
from kernels.threads import set_threads


def exact(gate: Tensor, up: Tensor, weight: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
    """Gradients of gate, up and weight in float64, for that of weight · h, and weight · h."""
    gate, up, weight = (tensor.double().requires_grad_() for tensor in (gate, up, weight))
    out = weight[:, None] * (gate * torch.sigmoid(gate) * up)
    return (*torch.autograd.grad(out, (gate, up, weight), dh.double()), out)


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 5), (40, 352), (200, 130)])
@pytest.mark.parametrize("apart", [True, False])
def test_gradients_are_autograds(rows: int, width: int, apart: bool) -> None:
    halves = (5 * torch.randn(rows, 2 * width)).chunk(2, dim=-1)
    gate, up = (half.contiguous() for half in halves) if apart else halves
    weight, dh = torch.rand(rows), torch.randn(rows, width)
    dgate, dup, dweight, h = exact(gate, up, weight, dh)
    assert torch.allclose(gated(gate, up).double() * weight[:, None], h, atol=1e-5, rtol=1e-5)
    found, found_h, found_weight = weighted_gradients(gate, up, weight, dh)
    assert torch.allclose(found.double(), torch.cat((dgate, dup), dim=-1), atol=1e-5, rtol=1e-5)
    assert torch.allclose(found_h.double(), h, atol=1e-5, rtol=1e-5)
    assert torch.allclose(found_weight.double(), dweight, atol=1e-4, rtol=1e-5)
    if native_serves(gate):
        plain = torch.cat(exact(gate, up, torch.ones(rows), dh)[:2], dim=-1)
        assert torch.allclose(gated_gradients(gate, up, dh).double(), plain, atol=1e-5, rtol=1e-5)


def test_the_ends_of_the_sigmoid_are_numbers_and_what_is_none_stays_so() -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4, float("nan")]])
    up, dh = torch.full_like(gate, 2.0), torch.full_like(gate, 3.0)
    dgate, dup = weighted_gradients(gate, up, torch.ones(1), dh)[0].chunk(2, dim=-1)
    limits = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0])
    assert torch.allclose(dgate[0, :-1], 6 * limits, atol=1e-6)
    assert torch.allclose(dup[0, :-1], 3 * torch.tensor([0.0, 0.0, 0.0, 0.0, 88.0, 100.0, 1e4]), atol=1e-6)
    assert torch.allclose(gated(gate, up)[0, :-1], 2 * dup[0, :-1] / 3, atol=1e-6)
    assert torch.cat((dgate, dup, gated(gate, up)))[:, -1].isnan().all()


def test_a_rows_bits_are_its_own(kernels: str) -> None:
    if kernels == "torch":
        pytest.skip("torch's vector and scalar exponentials differ")
    gate, up = torch.randn(300, 2 * 77).chunk(2, dim=-1)
    weight, dh = torch.rand(300), torch.randn(300, 77)
    try:
        set_threads(3)
        whole = (gated(gate, up), *weighted_gradients(gate, up, weight, dh))
    finally:
        set_threads(1)
    rows = slice(17, 30)
    part = (gated(gate[rows], up[rows]), *weighted_gradients(gate[rows], up[rows], weight[rows], dh[rows]))
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[rows], other)
