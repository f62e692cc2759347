"""Paged latent attention against a loop over keys in float64; a token's bits are its own."""

import random
from dataclasses import dataclass

import pytest
import torch

from kernels.attention import latent_attention

HEADS, LATENT, ROTARY, BLOCK = 3, 40, 6, 4
WIDTH = LATENT + ROTARY
SCALE = 0.3


@dataclass(frozen=True)
class Paged:
    """Sequences of given lengths, their keys scattered over blocks in no order."""

    lengths: list[int]
    cache_BSW: torch.Tensor
    tables_QM: torch.Tensor
    q: list[torch.Tensor]  # [length, N, W] of each sequence

    def keys(self, sequence: int) -> torch.Tensor:
        blocks = self.tables_QM[sequence, : -(-self.lengths[sequence] // BLOCK)].long()
        return self.cache_BSW[blocks].flatten(0, 1)[: self.lengths[sequence]]

    def attend(self, chunks: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """One call over chunks (sequence, start, end); the outputs of each chunk."""
        q = torch.cat([self.q[sequence][start:end] for sequence, start, end in chunks])
        owners = torch.cat([torch.full((end - start,), sequence) for sequence, start, end in chunks]).int()
        positions = torch.cat([torch.arange(start, end) for _, start, end in chunks]).int()
        out = latent_attention(q, self.cache_BSW, self.tables_QM, owners, positions, LATENT, SCALE)
        return list(out.split([end - start for _, start, end in chunks]))


def paged(lengths: list[int], seed: int = 0) -> Paged:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    at = 0
    for sequence, count in enumerate(counts):
        tables[sequence, :count] = order[at : at + count].int()
        at += count
    cache = torch.randn(len(order), BLOCK, WIDTH, generator=generator)
    return Paged(
        lengths, cache, tables, [2 * torch.randn(length, HEADS, WIDTH, generator=generator) for length in lengths]
    )


def expected(data: Paged, sequence: int) -> torch.Tensor:
    keys = data.keys(sequence).double()
    scores = torch.einsum("tnw,jw->tnj", data.q[sequence].double(), keys) * SCALE
    length = data.lengths[sequence]
    hidden = torch.ones(length, length).triu(1).bool()
    weights = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1)
    return torch.einsum("tnj,jc->tnc", weights, keys[:, :LATENT])


@pytest.mark.parametrize("lengths", [[1], [7], [150], [1, 2, 3, 130, 40], [300, 5]])
def test_it_is_causal_softmax_attention(lengths: list[int]) -> None:
    data = paged(lengths)
    out = data.attend([(sequence, 0, length) for sequence, length in enumerate(lengths)])
    for sequence in range(len(lengths)):
        assert torch.allclose(out[sequence].double(), expected(data, sequence), atol=2e-5)


def test_no_chunking_and_no_company_changes_a_bit() -> None:
    lengths = [290, 131, 17]
    data = paged(lengths)
    whole = [data.attend([(sequence, 0, length)])[0] for sequence, length in enumerate(lengths)]
    rng = random.Random(3)
    for _ in range(20):
        chunks, pieces = [], []
        for sequence in rng.sample(range(3), rng.randint(1, 3)):
            start = rng.randrange(lengths[sequence])
            end = rng.choice([start + 1, rng.randint(start + 1, lengths[sequence])])
            chunks.append((sequence, start, end))
            pieces.append(whole[sequence][start:end])
        for got, wanted in zip(data.attend(chunks), pieces, strict=True):
            assert torch.equal(got, wanted)


def test_positions_of_a_sequence_may_have_gaps() -> None:
    data = paged([290])
    whole = data.attend([(0, 0, 290)])[0]
    chunks = [(0, 3, 5), (0, 50, 53), (0, 200, 201)]
    for got, (_, start, end) in zip(data.attend(chunks), chunks, strict=True):
        assert torch.equal(got, whole[start:end])


def test_blocks_elsewhere_give_the_same_bits() -> None:
    data = paged([140])
    moved = data.cache_BSW.roll(5, 0)
    tables = (data.tables_QM + 5) % len(moved)
    positions, owners = torch.arange(140).int(), torch.zeros(140).int()
    out = latent_attention(data.q[0], moved, tables, owners, positions, LATENT, SCALE)
    assert torch.equal(out, data.attend([(0, 0, 140)])[0])


def test_large_scores_do_not_overflow() -> None:
    data = paged([50])
    big = Paged(data.lengths, data.cache_BSW, data.tables_QM, [100 * data.q[0]])
    out = big.attend([(0, 0, 50)])[0]
    assert torch.allclose(out.double(), expected(big, 0), atol=1e-4)
