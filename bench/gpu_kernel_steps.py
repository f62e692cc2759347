"""What `bench.gpu_kernels` measures between the products: attention in its tiles, and what is done row by row."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.gpu_kernel_cases import BF16, DEVICE, FP32, LITE, ROWS, Call, Case, Work, capability, drawn
from kernels.gpu import attention
from kernels.gpu.attention import latent_attention
from kernels.gpu.attention_cut import Cut, Tile, cut_for, tiles_for
from kernels.gpu.experts import places
from kernels.gpu.rows import combine, rms_norm, rotate_heads, write_latents
from kernels.gpu.tiles import blocks
from kernels.gpu.topk import softmax_top_k

BLOCK = 16  # positions of a block of the cache
BATCHES, LENGTHS = (1, 8, 32, 128), (1024, 8192)
SPLITS = (128, 256, 512)
TILES = (  # with four warps, one of 64 rows has no registers for its latents
    Tile(64, 16, 8),
    Tile(64, 32, 8),
    Tile(64, 64, 8),
    Tile(64, 32, 16),
    Tile(16, 32, 4),
    Tile(16, 64, 4),
    Tile(16, 64, 8),
    Tile(32, 32, 8),
)
EPS, SCALE = LITE.rms_norm_eps, LITE.latent_width**-0.5
_HEADS, _WIDTH, _LATENT, _HIDDEN = LITE.num_attention_heads, LITE.latent_width, LITE.kv_lora_rank, LITE.hidden_size
_ROTARY, _EXPERTS, _TOP_K = LITE.qk_rope_head_dim, LITE.n_routed_experts, LITE.num_experts_per_tok


@dataclass(frozen=True, slots=True)
class Way:
    """How attention computes; the keys of a split are a constant of `kernels/gpu/attention.py`."""

    tile: Tile
    split: int
    cut: Cut

    @property
    def label(self) -> str:
        how = "apart" if self.cut.apart else "walked"
        together = " together" if self.cut.together else ""
        return f"{self.tile.rows}x{self.tile.keys} w{self.tile.warps} split {self.split} {how}{together}"


@contextlib.contextmanager
def splits_of(keys: int) -> Iterator[None]:
    """`kernels/gpu/attention.py` with splits of so many keys; its own are put back afterwards."""
    before = attention.SPLIT
    attention.SPLIT = keys
    try:
        yield
    finally:
        attention.SPLIT = before


@dataclass(frozen=True, slots=True)
class Attention:
    """`new` tokens of each sequence, which have `before` others before them."""

    name: str
    sequences: int
    before: int
    new: int

    @property
    def rows(self) -> int:
        return self.sequences * self.new

    def work(self) -> Work:
        """Latents are read once; a pair of a query and a key takes 2 FLOP for each number of the key and the value."""
        latents = self.sequences * (self.before + self.new) * _WIDTH
        pairs = self.sequences * (self.new * self.before + self.new * (self.new + 1) // 2)
        width = _WIDTH + _LATENT
        row = _HEADS * width * BF16.itemsize
        return Work(latents * BF16.itemsize, self.rows * row, 2.0 * pairs * _HEADS * width)

    def make(self, way: Way, calls: int) -> Sequence[Call]:
        """Blocks lie in no order."""
        each = blocks(self.before + self.new, BLOCK)
        count = calls * self.sequences * each
        cache = drawn(count, BLOCK, _WIDTH)
        tables = torch.randperm(count, device=DEVICE).int().view(calls, self.sequences, each)
        q = drawn(self.rows, _HEADS, _WIDTH)
        sequence = torch.arange(self.sequences, device=DEVICE).repeat_interleave(self.new).int()
        position = torch.arange(self.before, self.before + self.new, device=DEVICE).repeat(self.sequences).int()

        def attend(table: Tensor) -> Tensor:
            with splits_of(way.split):
                return latent_attention(q, cache, table, sequence, position, _LATENT, SCALE, way.cut, way.tile)

        return [partial(attend, table) for table in tables]

    def ways(self) -> Iterator[Way]:
        """The one in use; then other cuts, other splits and other tiles, each with the rest as it is in use."""
        used = self.used
        yield used
        cuts, either = [Cut(False, True), Cut(True, True), Cut(False, False)], [used]
        if self.new == 1:
            cuts = [Cut(apart, together) for apart in (True, False) for together in (False, True)]
            either = [replace(used, cut=Cut(apart, used.cut.together)) for apart in (True, False)]
        yield from (replace(used, cut=cut) for cut in cuts)
        yield from (replace(way, split=split) for way in either for split in SPLITS)
        yield from (replace(way, tile=tile) for way in either for tile in TILES)

    @property
    def used(self) -> Way:
        splits = blocks(self.before + self.new, attention.SPLIT)
        cut = cut_for(self.rows, self.sequences, self.rows * _HEADS * splits * _LATENT)
        tiles = tiles_for(BF16, capability())
        return Way(tiles.many if cut.together else tiles.few, attention.SPLIT, cut)

    def cases(self) -> Iterator[Case]:
        for way in dict.fromkeys(self.ways()):
            yield Case(self.name, way.label, way == self.used, self.rows, self.work(), partial(self.make, way))


DECODES = tuple(
    Attention(f"attention, decode, {length} keys", batch, length - 1, 1) for length in LENGTHS for batch in BATCHES
)
PREFILLS = (
    Attention("attention, prefill 4 x 1024", 4, 0, 1024),
    Attention("attention, prefill 1 x 4096 after 4096", 1, 4096, 4096),
)
BITS = Attention("attention", 2, 500, 100)


def attention_cases() -> Iterator[Case]:
    for each in (*DECODES, *PREFILLS):
        yield from each.cases()


def attention_bit_cases() -> Iterator[Case]:
    """The first is what the others are compared with; tiles of as many keys may have its bits."""
    yield from BITS.cases()


def row_cases() -> Iterator[Case]:
    """Inputs and outputs, all of which no cache holds where rows are many; where they are few, only launches count."""
    kinds = (_norm, _rotate, _write, _route, _combine, _places)
    for kind in kinds:
        for rows in ROWS:
            name, row_bytes, make = kind(rows)
            yield Case(name, "", True, rows, Work(rows * row_bytes), make)


Kind = tuple[str, int, Callable[[int], Sequence[Call]]]  # a name, bytes of a row, calls


def _norm(rows: int) -> Kind:
    def make(calls: int) -> Sequence[Call]:
        weight = drawn(_HIDDEN)
        return [partial(rms_norm, x, weight, EPS) for x in drawn(calls, rows, _HIDDEN)]

    return "norm", 2 * _HIDDEN * BF16.itemsize, make


def _turns(rows: int) -> tuple[Tensor, Tensor]:
    return drawn(rows, _ROTARY // 2, dtype=FP32), drawn(rows, _ROTARY // 2, dtype=FP32)


def _rotate(rows: int) -> Kind:
    def make(calls: int) -> Sequence[Call]:
        q = drawn(calls, rows, _HEADS, LITE.qk_nope_head_dim + _ROTARY)
        cos, sin = _turns(rows)
        return [partial(rotate_heads, each, cos, sin, drawn(rows, _HEADS, _WIDTH)) for each in q]

    return "rotate", 2 * _HEADS * _ROTARY * BF16.itemsize + _ROTARY * FP32.itemsize, make


def _write(rows: int) -> Kind:
    def make(calls: int) -> Sequence[Call]:
        weight, (cos, sin) = drawn(_LATENT), _turns(rows)
        cache = torch.empty(blocks(rows, BLOCK), BLOCK, _WIDTH, dtype=BF16, device=DEVICE)
        slot = torch.arange(rows, device=DEVICE)
        return [partial(write_latents, kv, weight, EPS, cos, sin, slot, cache) for kv in drawn(calls, rows, _WIDTH)]

    return "write_latents", 2 * _WIDTH * BF16.itemsize + _ROTARY * FP32.itemsize + torch.int64.itemsize, make


def _route(rows: int) -> Kind:
    def make(calls: int) -> Sequence[Call]:
        logits = drawn(calls, rows, _EXPERTS, dtype=FP32)
        return [partial(softmax_top_k, each, 1, 1, _TOP_K, False, 1.0) for each in logits]

    return "route", _EXPERTS * FP32.itemsize + _TOP_K * (torch.int64.itemsize + FP32.itemsize), make


def _combine(rows: int) -> Kind:
    def make(calls: int) -> Sequence[Call]:
        answers = drawn(calls, rows * _TOP_K, _HIDDEN, dtype=FP32)
        weights, shared, residual = drawn(rows, _TOP_K, dtype=FP32), drawn(rows, _HIDDEN), drawn(rows, _HIDDEN)
        return [partial(combine, each, weights, shared, residual, BF16) for each in answers]

    return "combine", _TOP_K * (_HIDDEN + 1) * FP32.itemsize + 3 * _HIDDEN * BF16.itemsize, make


def _places(rows: int) -> Kind:
    def make(calls: int) -> Sequence[Call]:
        scores = torch.rand(calls, rows, _EXPERTS, device=DEVICE)
        return [partial(places, key, _EXPERTS) for key in scores.topk(_TOP_K).indices.flatten(1)]

    return "places", _TOP_K * (torch.int64.itemsize + torch.int32.itemsize), make
