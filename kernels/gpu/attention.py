"""Absorbed latent attention over a paged cache.

The keys of a sequence are taken in splits of SPLIT positions, each with a softmax of its own, and the splits are merged
in rising order: by one program that walks them all where tokens are many, by programs side by side and a last one where
they are few. Both compute the same numbers in the same order, so many keys at a time, whose weights a product adds up,
and neither lets the compiler fuse a product and a sum as it likes: a token's bits depend on its own past alone.
Shapes: `T` tokens, `N` heads, `W` cache width, `C` latent, `B` blocks, `S` block size, `Q` sequences, `M` blocks of the
longest table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_cut import Cut, Tile, cut_for, tiles_for
from kernels.gpu.tiles import blocks, capability_of, power_of_two

SPLIT = 256  # keys; of a token's position alone, so it never varies
LOG2_E = 1.4426950408889634


@triton.jit
def _merge(total, total_sum, total_most, part, part_sum, part_most):
    """One more split after those before it; nothing changes where it has no key that a row may see."""
    most = tl.maximum(total_most, part_most)
    finite = tl.where(most == -float("inf"), 0.0, most)
    old, new = tl.exp2(total_most - finite), tl.exp2(part_most - finite)
    seen = part_most != -float("inf")  # what is not seen may be no number
    total = tl.where(seen[:, None], total * old[:, None] + part * new[:, None], total)
    return total, tl.where(seen, total_sum * old + part_sum * new, total_sum), most


@triton.jit
def _attend(
    q,
    cache,
    tables,
    sequence,
    position,
    out,
    parts,
    sums,
    mosts,
    tokens,
    heads,
    table_row,
    splits,
    scale,
    LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    LATENTS: tl.constexpr,
    ROTARIES: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    APART: tl.constexpr,
):
    WIDTH: tl.constexpr = LATENT + ROTARY
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    each = tl.arange(0, ROWS)
    t = tile * TOKENS + each // HEADS
    n = tl.program_id(1) * HEADS + each % HEADS
    is_row = (each < TOKENS * HEADS) & (t < tokens) & (n < heads)
    t_safe = tl.minimum(t, tokens - 1)
    owner = tl.load(sequence + t_safe)
    last = tl.where(is_row, tl.load(position + t_safe), -1)
    c, r = tl.arange(0, LATENTS), tl.arange(0, ROTARIES)
    row = t.to(tl.int64) * heads + n
    q_at = q + row[:, None] * WIDTH
    q_latent = tl.load(q_at + c[None, :], mask=is_row[:, None] & (c[None, :] < LATENT), other=0.0)
    q_rotary = tl.load(q_at + LATENT + r[None, :], mask=is_row[:, None] & (r[None, :] < ROTARY), other=0.0)

    total = tl.zeros((ROWS, LATENTS), dtype=tl.float32)
    total_sum = tl.zeros((ROWS,), dtype=tl.float32)
    total_most = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    first_owner, last_owner = tl.min(owner, axis=0), tl.max(owner, axis=0)
    for s in range(first_owner, last_owner + 1):  # of tokens of other sequences, nothing changes
        row_last = tl.where(owner == s, last, -1)
        furthest = tl.max(row_last, axis=0)
        if APART:
            split_from, split_to = tl.program_id(2), tl.program_id(2) + 1
        else:
            split_from, split_to = 0, furthest // SPLIT + 1
        for split in range(split_from, split_to):
            part = tl.zeros((ROWS, LATENTS), dtype=tl.float32)
            part_sum = tl.zeros((ROWS,), dtype=tl.float32)
            part_most = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
            until = tl.minimum((split + 1) * SPLIT, furthest + 1)
            for first in range(split * SPLIT, until, KEYS):
                j = first + tl.arange(0, KEYS)
                is_key = j <= furthest
                block = tl.load(tables + s * table_row + j // SIZE, mask=is_key, other=0)
                # Triton takes the sum for a multiple of SIZE, and a row then for better aligned than it may be
                place = tl.multiple_of(block.to(tl.int64) * SIZE + j % SIZE, 1)
                key_at = cache + place * WIDTH
                latent = tl.load(key_at[:, None] + c[None, :], mask=is_key[:, None] & (c[None, :] < LATENT), other=0.0)
                rotary = tl.load(
                    key_at[:, None] + LATENT + r[None, :], mask=is_key[:, None] & (r[None, :] < ROTARY), other=0.0
                )
                score = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
                score = tl.dot(q_rotary, tl.trans(rotary), score, input_precision="ieee") * scale
                score = tl.where(j[None, :] <= row_last[:, None], score, -float("inf"))
                most = tl.maximum(part_most, tl.max(score, axis=1))
                finite = tl.where(most == -float("inf"), 0.0, most)
                old = tl.exp2(part_most - finite)
                weight = tl.exp2(score - finite[:, None])
                weight = weight.to(latent.dtype)
                # all columns are the sum, in an order that is the instruction's and not the layout's
                added = tl.dot(weight, tl.full((KEYS, 16), 1.0, dtype=latent.dtype), input_precision="ieee")
                part_sum = part_sum * old + tl.max(added, axis=1)
                part = tl.dot(weight, latent, part * old[:, None], input_precision="ieee")
                part_most = most
            if APART:
                at = (row * splits + split).to(tl.int64)
                seen = is_row & (split * SPLIT <= row_last)
                tl.store(parts + at[:, None] * LATENT + c[None, :], part, mask=seen[:, None] & (c[None, :] < LATENT))
                tl.store(sums + at, part_sum, mask=seen)
                tl.store(mosts + at, part_most, mask=seen)
            else:
                total, total_sum, total_most = _merge(total, total_sum, total_most, part, part_sum, part_most)
    if not APART:
        done = total / tl.where(is_row, total_sum, 1.0)[:, None]
        whole = is_row[:, None] & (c[None, :] < LATENT)
        tl.store(out + row[:, None] * LATENT + c[None, :], done.to(out.dtype.element_ty), mask=whole)


@triton.jit
def _merge_parts(
    parts,
    sums,
    mosts,
    position,
    out,
    rows,
    heads,
    splits,
    LATENT: tl.constexpr,
    LATENTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = row < rows
    last = tl.where(is_row, tl.load(position + row // heads, mask=is_row, other=0), -1)
    c = tl.arange(0, LATENTS)
    total = tl.zeros((ROWS, LATENTS), dtype=tl.float32)
    total_sum = tl.zeros((ROWS,), dtype=tl.float32)
    total_most = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    for split in range(tl.max(last, axis=0) // SPLIT + 1):
        at = row * splits + split
        seen = split * SPLIT <= last
        part = tl.load(parts + at[:, None] * LATENT + c[None, :], mask=seen[:, None] & (c[None, :] < LATENT), other=0.0)
        part_sum = tl.load(sums + at, mask=seen, other=0.0)
        part_most = tl.load(mosts + at, mask=seen, other=-float("inf"))
        total, total_sum, total_most = _merge(total, total_sum, total_most, part, part_sum, part_most)
    done = total / tl.where(is_row, total_sum, 1.0)[:, None]
    whole = is_row[:, None] & (c[None, :] < LATENT)
    tl.store(out + row[:, None] * LATENT + c[None, :], done.to(out.dtype.element_ty), mask=whole)


def latent_attention(
    q_TNW: Tensor,
    cache_BSW: Tensor,
    block_tables_QM: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    latent: int,
    scale: float,
    cut: Cut | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """As `kernels.attention.latent_attention`."""
    tokens, heads, width = q_TNW.shape
    sequences, most = block_tables_QM.shape
    size = cache_BSW.shape[1]
    assert q_TNW.is_contiguous()
    assert cache_BSW.is_contiguous()
    assert q_TNW.dtype == cache_BSW.dtype
    assert block_tables_QM.stride(1) == 1
    device = q_TNW.device
    out_TNC = torch.empty(tokens, heads, latent, dtype=q_TNW.dtype, device=device)
    if tokens == 0:
        return out_TNC
    splits = blocks(most * size, SPLIT)
    cut = cut_for(tokens, sequences, tokens * heads * splits * latent) if cut is None else cut
    if tile is None:
        tiles = tiles_for(q_TNW.dtype, capability_of(device))
        tile = tiles.many if cut.together else tiles.few
    tile_heads = min(tile.rows, power_of_two(heads))
    together = tile.rows // tile_heads if cut.together else 1
    parts = sums = mosts = q_TNW
    if cut.apart:
        parts = torch.empty(tokens, heads, splits, latent, dtype=torch.float32, device=device)
        sums = torch.empty(tokens, heads, splits, dtype=torch.float32, device=device)
        mosts = torch.empty_like(sums)
    _attend[(blocks(tokens, together), blocks(heads, tile_heads), splits if cut.apart else 1)](
        q_TNW,
        cache_BSW,
        block_tables_QM,
        sequence_T,
        position_T,
        out_TNC,
        parts,
        sums,
        mosts,
        tokens,
        heads,
        block_tables_QM.stride(0),
        splits,
        scale * LOG2_E,
        LATENT=latent,
        ROTARY=width - latent,
        LATENTS=power_of_two(latent, 16),
        ROTARIES=power_of_two(width - latent, 16),
        SIZE=size,
        TOKENS=together,
        HEADS=tile_heads,
        ROWS=tile.rows,
        KEYS=tile.keys,
        SPLIT=SPLIT,
        APART=cut.apart,
        num_warps=tile.warps,
        num_stages=2,
        enable_fp_fusion=False,
    )
    if cut.apart:
        _merge_parts[(tokens * heads,)](
            parts,
            sums,
            mosts,
            position_T,
            out_TNC,
            tokens * heads,
            heads,
            splits,
            LATENT=latent,
            LATENTS=power_of_two(latent, 16),
            ROWS=1,
            SPLIT=SPLIT,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out_TNC
