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
    firsts = np.cumsum(
        [0, *(len(row.segment_ends) for row in batch.rows)]
    ).tolist()  # sample number of each row's first
    dealt = [list(range(each, len(batch.rows), world)) for each in range(world)]
    groups = [_group(batch.rows, numbers, micro_batch_tokens) for numbers in dealt]
    micros = max(map(len, groups))
    mine = groups[rank]
    micro_batches = [lay_flat([batch.rows[number] for number in group], device) for group in mine]
    protected: tuple[Tensor | None, ...] = ()
    if protect_seed is not None:
        protected = tuple(_protected(batch.rows, group, firsts, protect_seed, step, device) for group in mine) + (
            None,
        ) * (micros - len(mine))
    return StepPlan(
        step=step,
        micro_batches=tuple(micro_batches) + (None,) * (micros - len(mine)),
        targets=batch.targets,
        sequences=firsts[-1],
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


def _protected(
    rows: Sequence[PackedRow], group: Sequence[int], firsts: Sequence[int], seed: int, step: int, device: str
) -> Tensor:
    parts: list[Tensor] = []
    for number in group:
        ends = rows[number].segment_ends
        lengths = torch.tensor(np.diff([0, *ends]))
        mask = torch.from_numpy(protected_sequences(seed, step, firsts[number], len(ends)))
        parts.append(mask.repeat_interleave(lengths))
    return torch.cat(parts).to(device)
