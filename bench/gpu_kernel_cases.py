"""What `bench.gpu_kernels` measures of products and experts: each with every tile that it might have.

All is of DeepSeek-V2-Lite's shape. What a call has to do at least is counted, so that its time becomes a share of what
the device can do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bench.gpu_kernel_results import TORCH
from bench.gpu_work import distinct_experts
from bench.random_checkpoint import DEVIATION, v2_lite_config
from kernels.gpu.experts import expert_layer
from kernels.gpu.product import head_products, product
from kernels.gpu.tiles import Tile, tile_for

LITE = v2_lite_config()
BF16, FP32 = torch.bfloat16, torch.float32
DEVICE = "cuda"
ROWS = (1, 8, 32, 128, 512, 4096)
BITS_ROWS = 512
COLD_BYTES = 256 << 20  # several times what an L2 cache holds
LEAST_CALLS, MOST_CALLS = 3, 512
LONG_FLOPS = 2e12  # of calls that last so long together, what a cache holds changes little
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a device has with one call."""

    cold_bytes: float  # weights, or whatever else no cache holds when a call's turn comes
    warm_bytes: float = 0.0  # what the step before has just written, and what is written now
    flops: float = 0.0

    @property
    def calls(self) -> int:
        """How many, each with weights of its own, are needed until a cache has lost those of the first."""
        cold = min(-(-COLD_BYTES // self.cold_bytes), MOST_CALLS)
        return max(LEAST_CALLS, int(min(cold, LONG_FLOPS / self.flops) if self.flops else cold))


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel in one tile, for so many rows."""

    what: str
    tile: str
    used: bool  # by kernels/gpu, when it is left to choose
    rows: int
    work: Work
    make: Callable[[int], Sequence[Call]]  # so many calls; draws what they read, on the device


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tile, and for how many rows of one weight it might be the fastest."""

    tile: Tile
    least: int
    most: int


NARROW = (
    Candidate(Tile(16, 64, 128, 4, 4, True), 1, 32),
    Candidate(Tile(16, 64, 128, 4, 6, True), 1, 32),
    Candidate(Tile(16, 64, 256, 4, 3, True), 1, 32),
    Candidate(Tile(16, 64, 256, 4, 4, True), 1, 32),
    Candidate(Tile(16, 128, 128, 4, 4, True), 1, 32),
    Candidate(Tile(32, 64, 128, 4, 4, True), 8, 64),
    Candidate(Tile(64, 64, 64, 4, 4, True), 32, 512),
    Candidate(Tile(64, 128, 64, 8, 3, True), 32, 4096),
    Candidate(Tile(128, 128, 64, 8, 3, True), 48, 4096),
    Candidate(Tile(256, 128, 64, 8, 3, True), 512, 4096),
    Candidate(Tile(16, 16, 256, 4, 3), 1, 32),
    Candidate(Tile(16, 32, 128, 4, 4), 1, 32),
    Candidate(Tile(16, 32, 256, 4, 3), 1, 32),
    Candidate(Tile(16, 64, 128, 4, 3), 1, 32),
    Candidate(Tile(64, 16, 128, 4, 4), 1, 128),
    Candidate(Tile(64, 32, 128, 4, 4), 1, 128),
    Candidate(Tile(64, 32, 256, 4, 3), 1, 128),
    Candidate(Tile(64, 64, 64, 4, 4), 1, 4096),
    Candidate(Tile(64, 64, 128, 4, 3), 1, 4096),
    Candidate(Tile(64, 128, 64, 4, 4), 8, 4096),
    Candidate(Tile(64, 256, 64, 8, 3), 48, 4096),
    Candidate(Tile(128, 128, 64, 8, 3), 48, 4096),
    Candidate(Tile(128, 128, 64, 8, 4), 48, 4096),
    Candidate(Tile(128, 256, 64, 8, 3), 48, 4096),
)
WIDE = (
    Candidate(Tile(16, 16, 64, 4, 3), 1, 4096),
    Candidate(Tile(16, 32, 32, 4, 2), 1, 4096),
    Candidate(Tile(16, 64, 32, 4, 2), 1, 4096),
    Candidate(Tile(32, 64, 32, 4, 2), 32, 4096),
    Candidate(Tile(64, 64, 32, 8, 2), 32, 4096),
)


def capability() -> tuple[int, int] | None:
    """Of the device that is measured; None where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def used_tile(rows: float, dtype: torch.dtype) -> Tile:
    return tile_for(rows, dtype, capability())


def tiles_for(rows: float, dtype: torch.dtype) -> list[Tile]:
    """The one in use first, then every candidate."""
    candidates = WIDE if dtype == FP32 else NARROW
    return _distinct(used_tile(rows, dtype), [each.tile for each in candidates if each.least <= rows <= each.most])


def all_tiles(dtype: torch.dtype) -> list[Tile]:
    """The one in use for one row first."""
    return _distinct(used_tile(1, dtype), [each.tile for each in (WIDE if dtype == FP32 else NARROW)])


def _distinct(used: Tile, tiles: Sequence[Tile]) -> list[Tile]:
    return list(dict.fromkeys((used, *tiles)))


def label(tile: Tile) -> str:
    swapped = " swapped" if tile.swapped else ""
    return f"{tile.rows}x{tile.outputs}x{tile.inner} w{tile.warps} s{tile.stages}{swapped}"


def drawn(*shape: int, dtype: torch.dtype = BF16, deviation: float = 1.0) -> Tensor:
    """Random numbers: products of zeros take less power, and are faster."""
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_(0.0, deviation)


@dataclass(frozen=True, slots=True)
class Product:
    """x · weightᵀ, of one weight or, with `heads`, of one for each."""

    name: str
    outputs: int
    inner: int
    heads: int | None = None
    dtype: torch.dtype = BF16
    out_dtype: torch.dtype = BF16

    def work(self, rows: int) -> Work:
        weights = (self.heads or 1) * self.outputs * self.inner
        row = (self.heads or 1) * (self.inner * self.dtype.itemsize + self.outputs * self.out_dtype.itemsize)
        return Work(weights * self.dtype.itemsize, rows * row, 2.0 * rows * weights)

    def make(self, rows: int, tile: Tile | None, out_dtype: torch.dtype, calls: int) -> Sequence[Call]:
        """Without a tile torch's own, whose results are of the weight's dtype."""
        heads = () if self.heads is None else (self.heads,)
        weights = drawn(calls, *heads, self.outputs, self.inner, dtype=self.dtype, deviation=DEVIATION)
        x = drawn(rows, *heads, self.inner, dtype=self.dtype)
        if self.heads is None:
            ours = [partial(product, x, weight, out_dtype, None, tile) for weight in weights]
            return ours if tile else [partial(F.linear, x, weight) for weight in weights]
        out = torch.empty(rows, *heads, self.outputs, dtype=out_dtype, device=DEVICE)
        by_head = [partial(_head_products, x, weight, out, tile) for weight in weights]
        return by_head if tile else [partial(torch.einsum, "tnk,nok->tno", x, weight) for weight in weights]

    def cases(self) -> Iterator[Case]:
        for rows in ROWS:
            work, used = self.work(rows), used_tile(rows, self.dtype)
            for tile in tiles_for(rows, self.dtype):
                make = partial(self.make, rows, tile, self.out_dtype)
                yield Case(self.name, label(tile), tile == used, rows, work, make)
            yield Case(self.name, TORCH, False, rows, work, partial(self.make, rows, None, self.out_dtype))

    def bit_cases(self) -> Iterator[Case]:
        """Results in float32, as they were summed."""
        for tile in all_tiles(self.dtype):
            make = partial(self.make, BITS_ROWS, tile, FP32)
            yield Case(self.name, label(tile), False, BITS_ROWS, self.work(BITS_ROWS), make)


def _head_products(x: Tensor, weight: Tensor, out: Tensor, tile: Tile | None) -> Tensor:
    head_products(x, weight, out, tile)
    return out


@dataclass(frozen=True, slots=True)
class Experts:
    """silu(x · gateᵀ) · (x · upᵀ) · downᵀ of `top_k` of `experts`; of one, it is the shared experts' network."""

    name: str
    experts: int
    top_k: int
    intermediate: int
    out_dtype: torch.dtype

    def work(self, rows: int) -> Work:
        """Counts the experts that rows choose on average, each evenly and for itself."""
        chosen = 1.0 if self.experts == 1 else distinct_experts(LITE, rows)
        weights = 3 * LITE.hidden_size * self.intermediate
        row = LITE.hidden_size * (BF16.itemsize + self.top_k * self.out_dtype.itemsize)
        return Work(chosen * weights * BF16.itemsize, rows * row, 2.0 * rows * self.top_k * weights)

    def make(self, rows: int, tile: Tile, calls: int) -> Sequence[Call]:
        gate_up = drawn(calls, self.experts, 2 * self.intermediate, LITE.hidden_size, deviation=DEVIATION)
        down = drawn(calls, self.experts, LITE.hidden_size, self.intermediate, deviation=DEVIATION)
        x = drawn(rows, LITE.hidden_size)
        out = torch.empty(rows * self.top_k, LITE.hidden_size, dtype=self.out_dtype, device=DEVICE)

        def answer(key: Tensor, table: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
            """`weights` are what the table has the addresses of: they live as long as the call."""
            expert_layer(x, key, table, self.intermediate, out, top_k=self.top_k, tile=tile)
            return out

        made: list[Call] = []
        for layer in zip(gate_up, down, strict=True):
            addresses = [[weight.data_ptr() for weight in weights] for weights in layer]
            key = torch.rand(rows, self.experts, device=DEVICE).topk(self.top_k).indices.reshape(-1)
            made.append(partial(answer, key, torch.tensor(addresses, device=DEVICE), layer))
        return made

    def cases(self) -> Iterator[Case]:
        for rows in ROWS:
            each = rows * self.top_k / self.experts
            used = used_tile(each, BF16)
            for tile in tiles_for(max(1.0, each), BF16):
                make = partial(self.make, rows, tile)
                yield Case(self.name, label(tile), tile == used, rows, self.work(rows), make)

    def bit_cases(self) -> Iterator[Case]:
        for tile in all_tiles(BF16):
            make = partial(self.make, BITS_ROWS, tile)
            yield Case(self.name, label(tile), False, BITS_ROWS, self.work(BITS_ROWS), make)


_HEADS, _LATENT = LITE.num_attention_heads, LITE.kv_lora_rank
QUERY = Product("query 3072x2048", _HEADS * (LITE.qk_nope_head_dim + LITE.qk_rope_head_dim), LITE.hidden_size)
KV_A = Product("kv_a 576x2048", LITE.latent_width, LITE.hidden_size)
HEAD = Product("head 102400x2048", LITE.vocab_size, LITE.hidden_size, out_dtype=FP32)
GATE = Product("gate 64x2048 fp32", LITE.n_routed_experts, LITE.hidden_size, None, FP32, FP32)
UP_KEY = Product("heads 128->512", _LATENT, LITE.qk_nope_head_dim, _HEADS)
UP_VALUE = Product("heads 512->128", LITE.v_head_dim, _LATENT, _HEADS)
ROUTED = Experts("experts", LITE.n_routed_experts, LITE.num_experts_per_tok, LITE.moe_intermediate_size, FP32)
SHARED = Experts("shared MLP", 1, 1, LITE.n_shared_experts * LITE.moe_intermediate_size, BF16)


def product_cases() -> Iterator[Case]:
    for each in (QUERY, KV_A, HEAD, GATE, UP_KEY, UP_VALUE, ROUTED, SHARED):
        yield from each.cases()


def product_bit_cases() -> Iterator[Case]:
    """The first of each name is what the others are compared with."""
    for each in (KV_A, UP_KEY, UP_VALUE, ROUTED, GATE):
        yield from each.bit_cases()
