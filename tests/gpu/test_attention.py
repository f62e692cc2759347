"""Paged attention against float64; a token's bits however it is chunked, batched and cut into programs."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.gpu import attention
from kernels.gpu.attention import latent_attention
from kernels.gpu.attention_cut import Cut
from tests.gpu.errors import close

HEADS, LATENT, ROTARY, BLOCK = 3, 40, 6, 4
SCALE = 0.3
Chunk = tuple[int, int, int]  # sequence, start, end


@dataclass(frozen=True)
class Paged:
    """Sequences whose keys lie in blocks in no order, and a query for each of their positions."""

    lengths: Sequence[int]
    cache: Tensor
    tables: Tensor
    queries: Sequence[Tensor]
    heads: int = HEADS

    def attend(self, chunks: Sequence[Chunk], cut: Cut | None = None) -> list[Tensor]:
        """One call; sequences are numbered anew, as an engine does."""
        device = self.cache.device
        q = torch.cat([self.queries[sequence][start:end] for sequence, start, end in chunks])
        owner = torch.cat([torch.full((end - start,), place) for place, (_, start, end) in enumerate(chunks)])
        position = torch.cat([torch.arange(start, end) for _, start, end in chunks])
        tables = self.tables[[sequence for sequence, _, _ in chunks]]
        out = latent_attention(
            q, self.cache, tables, owner.int().to(device), position.int().to(device), LATENT, SCALE, cut
        )
        return list(out.split([end - start for _, start, end in chunks]))

    def expected(self, sequence: int) -> Tensor:
        length = self.lengths[sequence]
        blocks = self.tables[sequence, : -(-length // BLOCK)].long()
        keys = self.cache[blocks].flatten(0, 1)[:length].double()
        scores = torch.einsum("tnw,jw->tnj", self.queries[sequence].double(), keys) * SCALE
        hidden = torch.ones(length, length, device=keys.device).triu(1).bool()
        weights = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1)
        return torch.einsum("tnj,jc->tnc", weights, keys[:, :LATENT])


def paged(lengths: Sequence[int], device: str, dtype: torch.dtype, heads: int = HEADS) -> Paged:
    generator = torch.Generator().manual_seed(8)
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator).int()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    at = 0
    for sequence, count in enumerate(counts):
        tables[sequence, :count] = order[at : at + count]
        at += count
    cache = torch.randn(len(order), BLOCK, LATENT + ROTARY, generator=generator)
    queries = [torch.randn(length, heads, LATENT + ROTARY, generator=generator).to(device, dtype) for length in lengths]
    return Paged(lengths, cache.to(device, dtype), tables.to(device), queries, heads)


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """So that a test has several."""
    monkeypatch.setattr(attention, "SPLIT", 64)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("heads", [3, 20])
def test_every_position_is_float64s(device: str, dtype: torch.dtype, apart: bool, heads: int) -> None:
    data = paged([1, 40, 9], device, dtype, heads)
    outs = data.attend([(0, 0, 1), (1, 0, 40), (2, 0, 9)], cut=Cut(apart, together=heads == 3))
    for sequence, out in enumerate(outs):
        close(out, data.expected(sequence), dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, by which Triton interprets
def test_what_is_no_number_in_one_sequence_stays_there(device: str, dtype: torch.dtype) -> None:
    data = paged([20, 9], device, dtype)
    wanted = data.attend([(0, 0, 20)])[0]
    data.cache[data.tables[1, :3].long()] = float("nan")
    for apart in (False, True):
        outs = data.attend([(0, 0, 20), (1, 0, 9)], Cut(apart, together=True))
        assert torch.equal(outs[0], wanted) if device == "cuda" else not outs[0].isnan().any()
        assert outs[1].isnan().all()


@pytest.mark.gpu
def test_a_tokens_bits_are_its_own(device: str, dtype: torch.dtype) -> None:
    lengths = [70, 9, 33] if device == "cpu" else [270, 9, 133]
    data = paged(lengths, device, dtype, heads=5)
    alone = [
        torch.cat([data.attend([(sequence, place, place + 1)])[0] for place in range(0, length, 3)])
        for sequence, length in enumerate(lengths)
    ]
    whole = [(sequence, 0, length) for sequence, length in enumerate(lengths)]
    for cut in (Cut(apart, together) for apart in (False, True) for together in (False, True)):
        for out, single in zip(data.attend(whole, cut), alone, strict=True):
            assert torch.equal(out[::3], single), cut
    parts = data.attend([(2, 30, lengths[2]), (0, 10, lengths[0]), (1, 3, 9)])
    assert torch.equal(parts[1], data.attend(whole)[0][10:])
