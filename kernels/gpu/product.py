"""x · weightᵀ for one weight, or for one a head.

Shapes: `R` rows, `K` inner, `N` outputs, `H` heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.tiles import Tile, blocks, tile_for

SWIZZLED = 8  # tiles of rows whose programs follow one another, so that they find each other's weights in the L2 cache


@triton.jit
def _product(
    x,
    weight,
    out,
    add,
    rows,
    outputs,
    x_row,
    x_head,
    weight_head,
    out_row,
    out_head,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ADDS: tl.constexpr,
):
    head = tl.program_id(1)
    row_tiles, output_tiles = tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS)
    in_group = GROUP * output_tiles
    group = tl.program_id(0) // in_group
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    place = tl.program_id(0) % in_group
    r = (group * GROUP + place % height) * ROWS + tl.arange(0, ROWS)
    n = (place // height) * OUTPUTS + tl.arange(0, OUTPUTS)
    x_at = x + r[:, None].to(tl.int64) * x_row + head * x_head
    weight_at = weight + n[None, :].to(tl.int64) * INNER + head * weight_head
    is_row, is_output = r[:, None] < rows, n[None, :] < outputs
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for first in range(0, INNER, BLOCK):
        k = first + tl.arange(0, BLOCK)
        if INNER % BLOCK == 0:
            left = tl.load(x_at + k[None, :], mask=is_row, other=0.0)
            right = tl.load(weight_at + k[:, None], mask=is_output, other=0.0)
        else:
            left = tl.load(x_at + k[None, :], mask=is_row & (k[None, :] < INNER), other=0.0)
            right = tl.load(weight_at + k[:, None], mask=is_output & (k[:, None] < INNER), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    place_out = r[:, None].to(tl.int64) * out_row + head * out_head + n[None, :]
    if ADDS:
        total += tl.load(add + place_out, mask=is_row & is_output, other=0.0).to(tl.float32)
    tl.store(out + place_out, total.to(out.dtype.element_ty), mask=is_row & is_output)


def product(
    x_RK: Tensor, weight_NK: Tensor, out_dtype: torch.dtype, add_RN: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """x · weightᵀ + add, [R, N]; x is taken in the weight's dtype, all sums are in float32."""
    x_RK = x_RK.to(weight_NK.dtype).contiguous()
    assert weight_NK.is_contiguous()
    rows, outputs = x_RK.shape[0], weight_NK.shape[0]
    out_RN = torch.empty(rows, outputs, dtype=out_dtype, device=x_RK.device)
    if add_RN is not None:
        add_RN = add_RN.contiguous()
        assert add_RN.shape == out_RN.shape, f"add has shape {tuple(add_RN.shape)}; expected {tuple(out_RN.shape)}"
    _launch(x_RK[None], weight_NK[None], out_RN[None], add_RN, tile)
    return out_RN


def head_products(x_TNK: Tensor, weight_NOK: Tensor, out_TNO: Tensor, tile: Tile | None = None) -> None:
    """out[:, n] = x[:, n] · weight[n]ᵀ for each head n; of all three, the last dimension is contiguous."""
    assert x_TNK.stride(2) == out_TNO.stride(2) == 1
    assert weight_NOK.is_contiguous()
    assert x_TNK.dtype == weight_NOK.dtype
    _launch(x_TNK.transpose(0, 1), weight_NOK, out_TNO.transpose(0, 1), None, tile)


def _launch(x_HRK: Tensor, weight_HNK: Tensor, out_HRN: Tensor, add_RN: Tensor | None, tile: Tile | None) -> None:
    heads, rows, inner = x_HRK.shape
    outputs = weight_HNK.shape[1]
    if rows == 0:
        return
    tile = tile_for(rows, weight_HNK.dtype) if tile is None else tile
    _product[(blocks(rows, tile.rows) * blocks(outputs, tile.outputs), heads)](
        x_HRK,
        weight_HNK,
        out_HRN,
        out_HRN if add_RN is None else add_RN,
        rows,
        outputs,
        x_HRK.stride(1),
        x_HRK.stride(0),
        weight_HNK.stride(0),
        out_HRN.stride(1),
        out_HRN.stride(0),
        INNER=inner,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        BLOCK=tile.inner,
        GROUP=SWIZZLED,
        ADDS=add_RN is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
