"""The experts of a layer in two products: rows are grouped by expert on the device, and nothing waits for the host.

Weights lie where they were loaded; a table has their addresses, so that experts come and go one by one.
Shapes: `T` tokens, `P` (row, expert) pairs, `D` model, `I` intermediate, `E` experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.inner import multiplied, multiplied_twice
from kernels.gpu.tiles import Tile, blocks, capability_of, power_of_two, tile_for

COUNTED = 2048  # pairs up to which a pair's place is counted, not sorted for
COUNTERS = 16  # pairs whose places a program counts
STEP = 128
LAST: tl.constexpr = tl.constexpr(1 << 30)  # after every key


@triton.jit
def _count_places(
    key, order, ends, pairs, experts, PAIRS: tl.constexpr, EXPERTS: tl.constexpr, FEW: tl.constexpr, STEP: tl.constexpr
):
    """The place of each pair among those of rising key, equal ones by number; and how many have a key of e or less."""
    first = tl.program_id(0) * FEW
    if first < pairs:
        p = first + tl.arange(0, FEW)
        mine = tl.load(key + p, mask=p < pairs, other=0).to(tl.int32)
        place = tl.zeros((FEW,), dtype=tl.int32)
        for start in range(0, PAIRS, STEP):
            q = start + tl.arange(0, STEP)
            other = tl.load(key + q, mask=q < pairs, other=LAST).to(tl.int32)
            before = (other[None, :] < mine[:, None]) | ((other[None, :] == mine[:, None]) & (q[None, :] < p[:, None]))
            place += tl.sum(before.to(tl.int32), axis=1)
        tl.store(order + place, p, mask=p < pairs)
    else:  # the last program
        e = tl.arange(0, EXPERTS)
        count = tl.zeros((EXPERTS,), dtype=tl.int32)
        for start in range(0, PAIRS, STEP):
            q = start + tl.arange(0, STEP)
            other = tl.load(key + q, mask=q < pairs, other=LAST).to(tl.int32)
            count += tl.sum((other[None, :] <= e[:, None]).to(tl.int32), axis=1)
        tl.store(ends + e, count, mask=e < experts)


@triton.jit
def _block(table, ends, block, pairs, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The weights' address of a block of rows, 0 where there are none, and the first and the end of its places."""
    if EXPERTS == 1:  # whose places are the pairs as they come
        expert, first, last = 0, block * ROWS, pairs
    else:
        e = tl.arange(0, EXPERTS)
        end = tl.load(ends + e, mask=e < experts, other=0)
        begin = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
        count = tl.where(e < experts, tl.cdiv(end - begin, ROWS), 0)
        until = tl.cumsum(count, axis=0)
        expert = tl.sum(((until <= block) & (e < experts)).to(tl.int32), axis=0)
        before = tl.sum(tl.where(e < expert, count, 0), axis=0)
        first = tl.sum(tl.where(e == expert, begin, 0), axis=0) + (block - before) * ROWS
        last = tl.sum(tl.where(e == expert, end, 0), axis=0)
    return tl.load(table + expert, mask=expert < experts, other=0), first, last


@triton.jit
def _rows(order, first, end, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Places from the first on, which of them there are, and their pairs."""
    place = first + tl.arange(0, ROWS)
    is_row = place < end
    pair = place if EXPERTS == 1 else tl.load(order + place, mask=is_row, other=0)
    return place, is_row, pair


@triton.jit
def _hidden(
    x,
    table,
    order,
    ends,
    pair_row,
    hidden,
    pairs,
    experts,
    x_row,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWAPPED: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """silu(x · gateᵀ) · (x · upᵀ) of each place, [P, I]."""
    address, first, end = _block(table, ends, tl.program_id(1), pairs, experts, ROWS, EXPERTS)
    if address != 0:
        place, is_row, pair = _rows(order, first, end, ROWS, EXPERTS)
        row = tl.load(pair_row + pair, mask=is_row, other=0) if TOP_K == 0 else pair // TOP_K
        n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        gate = address.to(tl.pointer_type(x.dtype.element_ty))
        x_at = x + row.to(tl.int64) * x_row
        gate_at = tl.multiple_of(gate, 16) + n * INNER
        is_output = n[None, :] < WIDTH
        gates, ups = multiplied_twice(
            x_at, gate_at, gate_at + WIDTH * INNER, is_row, n < WIDTH, INNER, ROWS, OUTPUTS, BLOCK, SWAPPED
        )
        made = gates * tl.sigmoid(gates) * ups
        at = hidden + place[:, None].to(tl.int64) * WIDTH + n[None, :]
        tl.store(at, made.to(hidden.dtype.element_ty), mask=is_row[:, None] & is_output)


@triton.jit
def _answers(
    hidden,
    table,
    order,
    ends,
    out,
    add,
    pairs,
    experts,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWAPPED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """hidden · downᵀ (+ add) of each place, into the row of its pair."""
    address, first, end = _block(table, ends, tl.program_id(1), pairs, experts, ROWS, EXPERTS)
    if address != 0:
        place, is_row, pair = _rows(order, first, end, ROWS, EXPERTS)
        n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        down = address.to(tl.pointer_type(hidden.dtype.element_ty))
        hidden_at = hidden + place.to(tl.int64) * INNER
        down_at = tl.multiple_of(down, 16) + n * INNER
        is_output = n[None, :] < WIDTH
        total = multiplied(hidden_at, down_at, is_row, n < WIDTH, INNER, ROWS, OUTPUTS, BLOCK, SWAPPED)
        at = pair[:, None].to(tl.int64) * WIDTH + n[None, :]
        whole = is_row[:, None] & is_output
        if ADDS:
            total += tl.load(add + at, mask=whole, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=whole)


def places(key_P: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs by rising key, int32 [P], equal ones by number; and how many pairs have key e or less, int32 [E]."""
    pairs = key_P.shape[0]
    if pairs > COUNTED:
        sorted_P, order_P = torch.sort(key_P, stable=True)
        each_E = torch.arange(experts, dtype=key_P.dtype, device=key_P.device)
        return order_P.int(), torch.searchsorted(sorted_P, each_E, right=True, out_int32=True)
    order_P = torch.empty(pairs, dtype=torch.int32, device=key_P.device)
    end_E = torch.empty(experts, dtype=torch.int32, device=key_P.device)
    _count_places[(blocks(pairs, COUNTERS) + 1,)](
        key_P,
        order_P,
        end_E,
        pairs,
        experts,
        PAIRS=power_of_two(pairs, STEP),
        EXPERTS=power_of_two(experts),
        FEW=COUNTERS,
        STEP=STEP,
        num_warps=4,
    )
    return order_P, end_E


def expert_layer(
    x_TD: Tensor,
    key_P: Tensor,
    table_2E: Tensor,
    intermediate: int,
    out_PD: Tensor,
    pair_row_P: Tensor | None = None,
    top_k: int = 1,
    add_PD: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """out[p] = the network of expert key[p] applied to x[pair_row[p]], or to x[p // top_k] without pair_row.

    `table_2E`, int64, has the addresses of [gate; up], [2I, D], and of down, [D, I], all contiguous and in x's dtype.
    A key of E or more, or whose addresses are 0, is left out, and so is its row of `out_PD`; where E is 1, no key is
    looked at.
    """
    experts, hidden = table_2E.shape[1], x_TD.shape[1]
    pairs = key_P.shape[0]
    if pairs == 0:
        return
    order_P, end_E = (key_P, key_P) if experts == 1 else places(key_P, experts)
    hidden_PI = torch.empty(pairs, intermediate, dtype=x_TD.dtype, device=x_TD.device)
    tile = tile_for(pairs / experts, x_TD.dtype, capability_of(x_TD.device)) if tile is None else tile
    most = min(pairs, blocks(pairs, tile.rows) + experts)
    shared = {
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "BLOCK": tile.inner,
        "SWAPPED": tile.swapped,
        "EXPERTS": power_of_two(experts),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    _hidden[(blocks(intermediate, tile.outputs), most)](
        x_TD,
        table_2E[0],
        order_P,
        end_E,
        order_P if pair_row_P is None else pair_row_P,
        hidden_PI,
        pairs,
        experts,
        x_TD.stride(0),
        INNER=hidden,
        WIDTH=intermediate,
        TOP_K=top_k if pair_row_P is None else 0,
        **shared,
    )
    _answers[(blocks(hidden, tile.outputs), most)](
        hidden_PI,
        table_2E[1],
        order_P,
        end_E,
        out_PD,
        out_PD if add_PD is None else add_PD,
        pairs,
        experts,
        INNER=intermediate,
        WIDTH=hidden,
        ADDS=add_PD is not None,
        **shared,
    )
