"""From a global batch's rows to each worker's micro-batches."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attention.training.segments import MicroBatch
from attention.training.worker import StepPlan
from router.dropping import protected_sequences
from services.training.data.packing import PackedRow
from services.training.data.training_data import GlobalBatch


def plan_step(
    step: int,
    batch: GlobalBatch,
    rank: int,
    world: int,
    micro_batch_tokens: int,
    learning_rate: float,
    protect_seed: int | None = None,
    device: str = "cpu",
) -> StepPlan:
    """One worker's part; rows are dealt to workers in turn, and not divided.

    With `protect_seed`, a tenth of the step's samples is protected from dropping, the same ones for any `world`.
    """
    sequences = sum(len(row.segment_ends) for row in batch.rows)
    groups = [_group(batch.rows, batch.dealt(each, world), micro_batch_tokens) for each in range(world)]
    mine = groups[rank]
    none = (None,) * (max(map(len, groups)) - len(mine))
    protected: tuple[Tensor | None, ...] = ()
    if protect_seed is not None:
        kept = protected_sequences(protect_seed, step, 0, sequences)
        protected = (*(_protected(batch.rows, group, kept, device) for group in mine), *none)
    return StepPlan(
        step=step,
        micro_batches=(*(lay_flat([batch.rows[number] for number in group], device) for group in mine), *none),
        targets=batch.targets,
        sequences=sequences,
        learning_rate=learning_rate,
        protected=protected,
    )


def lay_flat(rows: Sequence[PackedRow], device: str = "cpu") -> MicroBatch:
    """One micro-batch of whole rows."""
    ends: list[int] = []
    start = 0
    for row in rows:
        ends.extend(start + end for end in row.segment_ends)
        start += len(row.token_T)

    def flat(arrays: Sequence[npt.NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    return MicroBatch(
        flat([row.token_T for row in rows]),
        flat([row.target_T for row in rows]),
        flat([row.position_T for row in rows]),
        tuple(ends),
    )


def _group(rows: Sequence[PackedRow], numbers: Sequence[int], most: int) -> list[list[int]]:
    """Rows in order, as many together as `most` tokens allow."""
    groups: list[list[int]] = []
    tokens = 0
    for number in numbers:
        length = len(rows[number].token_T)
        if not groups or tokens + length > most:
            groups.append([])
            tokens = 0
        groups[-1].append(number)
        tokens += length
    return groups


def _protected(rows: Sequence[PackedRow], group: Sequence[int], kept: npt.NDArray[np.bool_], device: str) -> Tensor:
    """Of each token of a micro-batch, whether its sample is kept whole; `kept` has the step's samples, in row order."""
    parts: list[Tensor] = []
    for number in group:
        first = sum(len(row.segment_ends) for row in rows[:number])
        ends = rows[number].segment_ends
        lengths = torch.tensor(np.diff([0, *ends]))
        parts.append(torch.from_numpy(kept[first : first + len(ends)]).repeat_interleave(lengths))
    return torch.cat(parts).to(device)
