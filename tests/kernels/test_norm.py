"""A norm's gradients against autograd's in float64, and that threads change no bit of them."""

import pytest
import torch

from kernels.norm import rms_norm, rms_norm_gradients
from kernels.threads import set_threads

EPS = 1e-3


@pytest.mark.parametrize("shape", [(1, 16), (3, 5), (130, 40), (4, 33, 7)])
def test_gradients_are_those_of_the_norm(shape: tuple[int, ...]) -> None:
    x, dout, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    out = exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + EPS) * exact_weight
    assert torch.allclose(rms_norm(x, weight, EPS).double(), out, atol=1e-5)
    wanted = torch.autograd.grad(out, (exact_x, exact_weight), dout.double())
    for found, exact in zip(rms_norm_gradients(dout, x, weight, EPS), wanted, strict=True):
        assert torch.allclose(found.double(), exact, atol=1e-4)


def test_parts_of_rows_are_taken_as_they_lie() -> None:
    wide, weight = torch.randn(20, 50), torch.randn(24)
    x, dout = wide[:, 3:27], wide[:, 26:]
    found = rms_norm_gradients(dout, x, weight, EPS)
    wanted = rms_norm_gradients(dout.clone(), x.clone(), weight, EPS)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_threads_change_no_bit(kernels: str) -> None:
    if kernels == "torch":
        pytest.skip("torch has threads of its own")
    x, dout, weight = torch.randn(1000, 100), torch.randn(1000, 100), torch.randn(100)
    try:
        set_threads(1)
        alone = rms_norm_gradients(dout, x, weight, EPS)
        set_threads(3)
        together = rms_norm_gradients(dout, x, weight, EPS)
    finally:
        set_threads(1)
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
