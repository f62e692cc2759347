"""One step's tokens, flat and ragged: what the decoder needs to know of the sequences they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention.rope import RotaryTable
from attention.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class StepBatch:
    """`T` tokens of `Q` sequences; a block table row holds at most `M` blocks; `L` rows want logits."""

    token_T: Tensor  # int64
    position_T: Tensor  # int32, absolute
    sequence_T: Tensor  # int32, row of the block tables
    slot_T: Tensor  # int64, where each token's latent goes: block * block_size + offset
    block_tables_QM: Tensor  # int32
    logit_row_L: Tensor  # int64, indexes into T
    cos_TR: Tensor  # fp32, [T, R / 2]
    sin_TR: Tensor  # fp32, [T, R / 2]

    def __len__(self) -> int:
        """T."""
        return self.token_T.shape[0]

    def halves(self) -> tuple["StepBatch", "StepBatch"]:
        """The earlier tokens and the later ones, in views; a sequence may lie in both, and no row wants logits."""
        middle = len(self) // 2
        return self._rows(slice(0, middle)), self._rows(slice(middle, len(self)))

    def _rows(self, rows: slice) -> "StepBatch":
        return replace(
            self,
            token_T=self.token_T[rows],
            position_T=self.position_T[rows],
            sequence_T=self.sequence_T[rows],
            slot_T=self.slot_T[rows],
            logit_row_L=self.logit_row_L[:0],
            cos_TR=self.cos_TR[rows],
            sin_TR=self.sin_TR[rows],
        )


def build_batch(chunks: Sequence[Chunk], block_size: int, rotary: RotaryTable) -> StepBatch:
    """The tokens of a step's chunks, one chunk after the other, on the device that has the rotary table."""
    device = rotary.cos_PR.device
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    for index, chunk in enumerate(chunks):
        sequence = chunk.sequence
        first = len(tokens)
        tokens.extend(sequence.tokens[chunk.start : chunk.end])
        positions.extend(range(chunk.start, chunk.end))
        owners.extend([index] * chunk.count)
        blocks = sequence.blocks
        slots.extend(blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.end))
        rows.extend(first + offset for offset in logit_rows(chunk))
    width = max(len(chunk.sequence.blocks) for chunk in chunks)
    tables = [[*chunk.sequence.blocks, *[0] * (width - len(chunk.sequence.blocks))] for chunk in chunks]
    position_T = torch.tensor(positions, dtype=torch.int32, device=device)
    cos_TR, sin_TR = rotary.at(position_T)
    return StepBatch(
        token_T=torch.tensor(tokens, device=device),
        position_T=position_T,
        sequence_T=torch.tensor(owners, dtype=torch.int32, device=device),
        slot_T=torch.tensor(slots, device=device),
        block_tables_QM=torch.tensor(tables, dtype=torch.int32, device=device),
        logit_row_L=torch.tensor(rows, dtype=torch.int64, device=device),
        cos_TR=cos_TR,
        sin_TR=sin_TR,
    )


def logit_rows(chunk: Chunk) -> range:
    """Offsets within the chunk whose logits are wanted: all while the prompt is being scored, else the last."""
    sequence = chunk.sequence
    if sequence.params.prompt_logprobs is not None and chunk.start < sequence.prompt_length:
        return range(chunk.count)
    return range(chunk.count - 1, chunk.count) if chunk.samples else range(0)
