"""The inner loop of every product, x · weightᵀ: one sum an output, that rises along the inner dimension."""

import triton
import triton.language as tl


@triton.jit
def _within(is_there, k, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Which numbers k of which rows there are."""
    return is_there[:, None] if INNER % BLOCK == 0 else is_there[:, None] & (k[None, :] < INNER)


@triton.jit
def _part(at, k, mask):
    """The numbers k of rows, of pointers to them; 0 where there are none."""
    return tl.load(at[:, None] + k[None, :], mask=mask, other=0.0)


@triton.jit
def _added(total, rows, outputs, SWAPPED: tl.constexpr):
    if SWAPPED:
        total = tl.dot(outputs, tl.trans(rows), total, input_precision="ieee")
    else:
        total = tl.dot(rows, tl.trans(outputs), total, input_precision="ieee")
    return total


@triton.jit
def multiplied(
    x_at,
    weight_at,
    is_row,
    is_output,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """[ROWS, OUTPUTS] float32, of pointers to rows [ROWS] and to outputs [OUTPUTS]; 0 where either is not there."""
    total = tl.zeros((OUTPUTS, ROWS) if SWAPPED else (ROWS, OUTPUTS), dtype=tl.float32)
    for first in range(0, INNER, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x_mask, weight_mask = _within(is_row, k, INNER, BLOCK), _within(is_output, k, INNER, BLOCK)
        total = _added(total, _part(x_at, k, x_mask), _part(weight_at, k, weight_mask), SWAPPED)
    return tl.trans(total) if SWAPPED else total


@triton.jit
def multiplied_twice(
    x_at,
    first_at,
    second_at,
    is_row,
    is_output,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """The same of two weights, for which the rows are read once."""
    one = tl.zeros((OUTPUTS, ROWS) if SWAPPED else (ROWS, OUTPUTS), dtype=tl.float32)
    other = tl.zeros((OUTPUTS, ROWS) if SWAPPED else (ROWS, OUTPUTS), dtype=tl.float32)
    for first in range(0, INNER, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x_mask, weight_mask = _within(is_row, k, INNER, BLOCK), _within(is_output, k, INNER, BLOCK)
        rows = _part(x_at, k, x_mask)
        outputs, others = _part(first_at, k, weight_mask), _part(second_at, k, weight_mask)
        one, other = _added(one, rows, outputs, SWAPPED), _added(other, rows, others, SWAPPED)
    if SWAPPED:
        one, other = tl.trans(one), tl.trans(other)
    return one, other
