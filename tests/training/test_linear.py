"""A linear map's gradients are autograd's own, and it keeps no more than they need."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from attention.training.linear import linear


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("outputs", [5, 200])
def test_gradients_are_those_of_torch(rows: int, outputs: int) -> None:
    x, weight = torch.randn(rows, 90, requires_grad=True), torch.randn(outputs, 90, requires_grad=True)
    dout = torch.randn(rows, outputs)

    def gradients(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x, weight), (x, weight), dout)

    assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-4)
    for found, wanted in zip(gradients(linear), gradients(F.linear), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("trained", "kept"), [("x", ["weight"]), ("weight", ["x"]), ("xweight", ["x", "weight"])])
def test_what_no_gradient_needs_is_not_kept(trained: str, kept: list[str]) -> None:
    x, weight = torch.randn(7, 4), torch.randn(3, 4)
    x.requires_grad_("x" in trained)
    weight.requires_grad_("weight" in trained)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):  # type: ignore[func-returns-value]
        linear(x, weight).sum().backward()
    assert [tensor.shape for tensor in saved] == [{"x": x, "weight": weight}[name].shape for name in kept]
    assert (x.grad is not None) is ("x" in trained)
    assert (weight.grad is not None) is ("weight" in trained)
