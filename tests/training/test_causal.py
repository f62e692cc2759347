"""Attention of samples laid flat against each sample by itself, and that no sample sees another."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from attention.training.causal import SampleGroups
from kernels.native import CHOICE, native

HEADS, WIDTH, SCALE = 3, 6, 0.3


@pytest.fixture(autouse=True, params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "torch":
        monkeypatch.setenv(CHOICE, "torch")
    elif native() is None:
        pytest.skip("no native kernels were built")
    native.cache_clear()
    yield
    native.cache_clear()


def tensors(tokens: int, value: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (WIDTH, WIDTH, value)
    return tuple(torch.randn(tokens, HEADS, width, generator=generator).requires_grad_() for width in shapes)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return SampleGroups(lengths, q.device).attend(q, k, v, SCALE)


def alone(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = zip(*(one.split(lengths) for one in (q, k, v)), strict=True)
    outs = [
        F.scaled_dot_product_attention(*(one.transpose(0, 1) for one in part), is_causal=True, scale=SCALE)
        for part in parts
    ]
    return torch.cat([out.transpose(0, 1) for out in outs])


@pytest.mark.parametrize("value", [4, 6, 9])
@pytest.mark.parametrize("lengths", [[1], [7], [5, 5, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [40, 3, 33, 3, 1, 17, 40]])
def test_outputs_and_gradients_are_those_of_each_sample_alone(lengths: list[int], value: int) -> None:
    given = tensors(sum(lengths), value)
    dout = torch.randn(sum(lengths), HEADS, value)
    found = attend(*given, lengths)
    wanted = alone(*given, lengths)
    assert torch.allclose(found, wanted, atol=1e-6)
    pairs = zip(torch.autograd.grad(found, given, dout), torch.autograd.grad(wanted, given, dout), strict=True)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in pairs)


def test_a_sample_that_is_spoilt_spoils_no_other() -> None:
    lengths = [6, 5, 7, 4]
    q, k, v = (one.detach() for one in tensors(sum(lengths)))
    for one in (q, k, v):
        one[6:11] = torch.nan
    out = attend(q, k, v, lengths)
    assert out[6:11].isnan().all()
    assert not out[:6].isnan().any()
    assert not out[11:].isnan().any()
