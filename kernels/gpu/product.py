"""x · weightᵀ for one weight, or for one a head.

Shapes: `R` rows, `K` inner, `N` outputs, `H` heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.inner import multiplied
from kernels.gpu.tiles import Tile, blocks, capability_of, tile_for

FEW_OUTPUTS = 256
PART = 128  # inner numbers
SUMMED = 256  # outputs of a program that adds parts
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
    SWAPPED: tl.constexpr,
    PARTS: tl.constexpr,
):
    head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    row_tiles, output_tiles = tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS)
    in_group = GROUP * output_tiles
    group = tl.program_id(0) // in_group
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    place = tl.program_id(0) % in_group
    r = (group * GROUP + place % height) * ROWS + tl.arange(0, ROWS)
    n = (place // height) * OUTPUTS + tl.arange(0, OUTPUTS)
    SOME: tl.constexpr = INNER // PARTS
    x_at = x + head * x_head + part * SOME + r.to(tl.int64) * x_row
    weight_at = weight + head * weight_head + part * SOME + n.to(tl.int64) * INNER
    is_row, is_output = r[:, None] < rows, n[None, :] < outputs
    total = multiplied(x_at, weight_at, r < rows, n < outputs, SOME, ROWS, OUTPUTS, BLOCK, SWAPPED)
    place_out = r[:, None].to(tl.int64) * out_row + (head * PARTS + part) * out_head + n[None, :]
    if ADDS:
        total += tl.load(add + place_out, mask=is_row & is_output, other=0.0).to(tl.float32)
    tl.store(out + place_out, total.to(out.dtype.element_ty), mask=is_row & is_output)


@triton.jit
def _sum_parts(parts, out, add, numbers, PARTS: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * numbers + i, mask=i < numbers, other=0.0)
    if ADDS:
        total += tl.load(add + i, mask=i < numbers, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < numbers)


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
    parts = parts_of(weight_NK)
    if parts == 1 or rows == 0:
        _launch(x_RK[None], weight_NK[None], out_RN[None], add_RN, tile)
        return out_RN
    part_PRN = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x_RK.device)
    _launch(x_RK[None], weight_NK[None], part_PRN, None, tile, parts)
    _sum_parts[(blocks(out_RN.numel(), SUMMED),)](
        part_PRN,
        out_RN,
        out_RN if add_RN is None else add_RN,
        out_RN.numel(),
        PARTS=parts,
        BLOCK=SUMMED,
        ADDS=add_RN is not None,
        num_warps=4,
    )
    return out_RN


def parts_of(weight_NK: Tensor) -> int:
    """In how many sums, added up in turn, a weight's inner dimension is taken: of its shape and dtype alone.

    Float32 takes long for each number, and the gate, whose outputs are few, would leave most of a device idle.
    """
    outputs, inner = weight_NK.shape
    whole = weight_NK.dtype == torch.float32 and outputs <= FEW_OUTPUTS and inner % PART == 0
    return inner // PART if whole else 1


def head_products(x_TNK: Tensor, weight_NOK: Tensor, out_TNO: Tensor, tile: Tile | None = None) -> None:
    """out[:, n] = x[:, n] · weight[n]ᵀ for each head n; of all three, the last dimension is contiguous."""
    assert x_TNK.stride(2) == out_TNO.stride(2) == 1
    assert weight_NOK.is_contiguous()
    assert x_TNK.dtype == weight_NOK.dtype
    _launch(x_TNK.transpose(0, 1), weight_NOK, out_TNO.transpose(0, 1), None, tile)


def _launch(
    x_HRK: Tensor, weight_HNK: Tensor, out_HRN: Tensor, add_RN: Tensor | None, tile: Tile | None, parts: int = 1
) -> None:
    heads, rows, inner = x_HRK.shape
    outputs = weight_HNK.shape[1]
    if rows == 0:
        return
    tile = tile_for(rows, weight_HNK.dtype, capability_of(x_HRK.device)) if tile is None else tile
    _product[(blocks(rows, tile.rows) * blocks(outputs, tile.outputs), heads * parts)](
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
        SWAPPED=tile.swapped,
        PARTS=parts,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
