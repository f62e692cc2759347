"""Causal attention of samples laid flat, and its gradients, against torch's in float64, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.build import INSTRUCTION_SETS
from kernels.causal import causal_attention, causal_gradients
from kernels.native import native_serves
from kernels.threads import set_threads

pytestmark = pytest.mark.parametrize("kernels", [*INSTRUCTION_SETS], indirect=True)  # torch has its own
SCALE = 0.2
Given = tuple[Tensor, Tensor, Tensor]


def drawn(tokens: int, heads: int, width: int, values: int) -> Given:
    """q, k and v as the model has them: values are the end of rows that begin with something else."""
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(tokens, heads, width, generator=generator) for _ in range(2))
    return q, k, torch.randn(tokens, heads, 5 + values, generator=generator)[..., 5:]


def both(given: Given, dout: Tensor, ends: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of q, k and v."""
    out, logs = causal_attention(*given, ends, SCALE)
    return out, *causal_gradients(dout, *given, out, logs, ends, SCALE)


def wanted(given: Given, dout: Tensor, ends: tuple[int, ...]) -> tuple[Tensor, ...]:
    exact = tuple(one.double().requires_grad_() for one in given)
    outs, start = [], 0
    for end in ends:
        part = [one[start:end].transpose(0, 1) for one in exact]
        outs.append(F.scaled_dot_product_attention(*part, is_causal=True, scale=SCALE).transpose(0, 1))
        start = end
    out = torch.cat(outs)
    return out, *torch.autograd.grad(out, exact, dout.double())


def test_they_serve_what_is_fp32() -> None:
    assert native_serves(torch.zeros(1))
    assert not native_serves(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(("heads", "width", "values"), [(1, 5, 3), (2, 48, 32), (3, 40, 33), (2, 24, 50)])
@pytest.mark.parametrize("ends", [(1,), (16,), (31, 32, 64), (7, 8, 50, 83), (131,)])
def test_outputs_and_gradients_are_those_of_softmax_attention(
    ends: tuple[int, ...], heads: int, width: int, values: int
) -> None:
    given = drawn(ends[-1], heads, width, values)
    dout = torch.randn(ends[-1], heads, values)
    for found, exact in zip(both(given, dout, ends), wanted(given, dout, ends), strict=True):
        assert torch.allclose(found.double(), exact, atol=3e-5)


def test_scores_far_apart_leave_one_weight_and_no_gradient() -> None:
    q, k, v = drawn(40, 1, 8, 8)
    out, dq, dk, _ = both((1e4 * q, k, v), torch.ones(40, 1, 8), (40,))
    best = (q[:, 0] @ k[:, 0].t()).tril().masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).argmax(-1)
    assert torch.allclose(out, v[best])
    assert out.isfinite().all()
    assert dq.isfinite().all()
    assert dk.isfinite().all()


def test_bits_are_a_samples_own_whatever_threads_and_samples_there_are() -> None:
    given = drawn(170, 2, 24, 20)
    dout = torch.randn(170, 2, 20)
    ends = (3, 70, 133, 170)
    try:
        set_threads(1)
        alone = both(given, dout, ends)
        set_threads(3)
        together = both(given, dout, ends)
        part = slice(70, 133)
        q, k, v = (one[part] for one in given)
        by_itself = both((q, k, v), dout[part], (63,))
    finally:
        set_threads(1)
    for one, other, own in zip(alone, together, by_itself, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[part], own)


def test_an_output_is_a_function_of_its_past_alone() -> None:
    q, k, v = drawn(100, 2, 24, 20)
    whole, _ = causal_attention(q, k, v, (100,), SCALE)
    for end in (1, 12, 13, 33, 64, 99):
        assert torch.equal(causal_attention(q[:end], k[:end], v[:end], (end,), SCALE)[0], whole[:end])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_is_not_lost(place: int) -> None:
    given = drawn(20, 1, 8, 8)
    given[place][7] = torch.nan
    out, dq, dk, dv = both(given, torch.ones(20, 1, 8), (20,))
    assert out[7].isnan().all()
    assert dq[7].isnan().all()
    assert dk[7].isnan().all()
    assert dv[7].isnan().all() == (place < 2)  # which the values themselves are no part of


def test_ends_that_do_not_fit_are_an_error() -> None:
    given = drawn(20, 1, 8, 8)
    for ends in ((19,), (21,), (5, 5, 20), (12, 8, 20), ()):
        with pytest.raises(AssertionError):
            causal_attention(*given, ends, SCALE)
