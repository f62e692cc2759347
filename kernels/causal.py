"""Causal attention of samples laid flat, and its gradients, by native kernels on CPU.

No scores of a whole sample are held, nothing above the diagonal is computed but the rest of a block, and samples of any
lengths go together. Shapes: `T` tokens, `N` heads, `Q` query and key width, `V` value width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.native import check_dense, native


def causal_attention(
    q_TNQ: Tensor, k_TNQ: Tensor, v_TNV: Tensor, ends: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q · k) · v of each token over its own sample up to itself, [T, N, V].

    Samples lie one after another and end at `ends`. The second result, [N, T], is the logarithm of each softmax's
    denominator, as `causal_gradients` wants it. A row's bits are a function of its sample up to itself alone.
    """
    library = native()
    assert library is not None
    (tokens, heads, width), values = q_TNQ.shape, v_TNV.shape[2]
    laid, places = _given(q_TNQ, k_TNQ, v_TNV, ends)
    out_TNV, logs_NT = torch.empty(tokens, heads, values), torch.empty(heads, tokens)
    library.shoal_causal_attention(
        *_addresses(laid),
        places.data_ptr(),
        len(places),
        heads,
        width,
        values,
        scale,
        out_TNV.data_ptr(),
        logs_NT.data_ptr(),
    )
    return out_TNV, logs_NT


def causal_gradients(
    dout_TNV: Tensor,
    q_TNQ: Tensor,
    k_TNQ: Tensor,
    v_TNV: Tensor,
    out_TNV: Tensor,
    logs_NT: Tensor,
    ends: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for that of what `causal_attention` gave."""
    library = native()
    assert library is not None
    (tokens, heads, width), values = q_TNQ.shape, v_TNV.shape[2]
    laid, places = _given(q_TNQ, k_TNQ, v_TNV, ends)
    dout_TNV = dout_TNV.contiguous()
    check_dense(torch.float32, dout_TNV, out_TNV, logs_NT)
    assert dout_TNV.shape == out_TNV.shape == (tokens, heads, values)
    assert logs_NT.shape == (heads, tokens)
    dq_TNQ, dk_TNQ = torch.empty(tokens, heads, width), torch.empty(tokens, heads, width)
    dv_TNV = torch.empty(tokens, heads, values)
    library.shoal_causal_gradients(
        dout_TNV.data_ptr(),
        *_addresses(laid),
        out_TNV.data_ptr(),
        logs_NT.data_ptr(),
        places.data_ptr(),
        len(places),
        heads,
        width,
        values,
        scale,
        dq_TNQ.data_ptr(),
        dk_TNQ.data_ptr(),
        dv_TNV.data_ptr(),
    )
    return dq_TNQ, dk_TNQ, dv_TNV


def _given(q_TNQ: Tensor, k_TNQ: Tensor, v_TNV: Tensor, ends: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """The three, or copies, with heads' numbers side by side, and where samples end, int64; asserts that they fit."""
    places = torch.tensor(ends, dtype=torch.int64)
    assert len(places)
    assert places[0] > 0
    assert (places.diff() > 0).all()
    assert places[-1] == len(q_TNQ), f"samples end at {ends[-1]}; expected {len(q_TNQ)} tokens"
    assert q_TNQ.shape == k_TNQ.shape
    assert q_TNQ.shape[:2] == v_TNV.shape[:2]
    given = (q_TNQ, k_TNQ, v_TNV)
    assert all(each.dtype is torch.float32 for each in given)
    return [each if each.stride(2) == 1 else each.contiguous() for each in given], places


def _addresses(laid: Sequence[Tensor]) -> Iterator[int]:
    """Where each begins, and what its tokens and its heads are apart."""
    for each in laid:
        yield from (each.data_ptr(), each.stride(0), each.stride(1))
