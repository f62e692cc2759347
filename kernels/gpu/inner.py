"""The inner loop of every product, x · weightᵀ: one sum an output, that rises along the inner dimension."""

import triton
import triton.language as tl


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
        if INNER % BLOCK == 0:
            x_mask, weight_mask = is_row[:, None], is_output[:, None]
        else:
            x_mask, weight_mask = is_row[:, None] & (k[None, :] < INNER), is_output[:, None] & (k[None, :] < INNER)
        rows = tl.load(x_at[:, None] + k[None, :], mask=x_mask, other=0.0)
        outputs = tl.load(weight_at[:, None] + k[None, :], mask=weight_mask, other=0.0)
        if SWAPPED:
            total = tl.dot(outputs, tl.trans(rows), total, input_precision="ieee")
        else:
            total = tl.dot(rows, tl.trans(outputs), total, input_precision="ieee")
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
        if INNER % BLOCK == 0:
            x_mask, weight_mask = is_row[:, None], is_output[:, None]
        else:
            x_mask, weight_mask = is_row[:, None] & (k[None, :] < INNER), is_output[:, None] & (k[None, :] < INNER)
        rows = tl.load(x_at[:, None] + k[None, :], mask=x_mask, other=0.0)
        outputs = tl.load(first_at[:, None] + k[None, :], mask=weight_mask, other=0.0)
        others = tl.load(second_at[:, None] + k[None, :], mask=weight_mask, other=0.0)
        if SWAPPED:
            one = tl.dot(outputs, tl.trans(rows), one, input_precision="ieee")
            other = tl.dot(others, tl.trans(rows), other, input_precision="ieee")
        else:
            one = tl.dot(rows, tl.trans(outputs), one, input_precision="ieee")
            other = tl.dot(rows, tl.trans(others), other, input_precision="ieee")
    if SWAPPED:
        one, other = tl.trans(one), tl.trans(other)
    return one, other
