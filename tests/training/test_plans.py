"""A step is dealt to workers whole: every row once, and the same samples protected whoever has them."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.dropping import protected_sequences
from services.training.data.packing import lay
from services.training.data.samples import Sample
from services.training.data.training_data import GlobalBatch
from services.training.plans import plan_step


def batch_of(rows: list[list[int]]) -> GlobalBatch:
    """Rows of samples of these lengths; every token is its sample's number."""
    made, number = [], 0
    for lengths in rows:
        samples = []
        for length in lengths:
            ids = np.full(length, number, dtype=np.int32)
            samples.append(Sample(ids, np.ones(length, dtype=bool), line=number + 1, source=0))
            number += 1
        made.append(lay(samples, range(number - len(lengths), number)))
    return GlobalBatch(tuple(made), tuple(range(number)), sum(row.targets for row in made), number, 1.0)


@given(
    rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=7),
    world=st.integers(1, 4),
    micro=st.integers(20, 45),
)
def test_every_row_is_computed_once_and_protection_is_the_steps(rows: list[list[int]], world: int, micro: int) -> None:
    batch = batch_of(rows)
    count = sum(map(len, rows))
    plans = [plan_step(3, batch, rank, world, micro, 1e-3, protect_seed=7) for rank in range(world)]
    assert len({len(plan.micro_batches) for plan in plans}) == 1
    assert all((plan.sequences, plan.targets) == (count, batch.targets) for plan in plans)
    kept = protected_sequences(7, 3, 0, count)
    seen: list[int] = []
    for plan in plans:
        assert len(plan.protected) == len(plan.micro_batches)
        for part, protected_T in zip(plan.micro_batches, plan.protected, strict=True):
            assert (part is None) == (protected_T is None)
            if part is None or protected_T is None:
                continue
            assert len(part.token_T) <= micro
            seen += part.token_T.tolist()
            assert torch.equal(protected_T, torch.from_numpy(kept)[part.token_T])
    assert sorted(seen) == sorted(token for row in batch.rows for token in row.token_T.tolist())


def test_rows_that_just_fill_a_micro_batch_are_computed_together() -> None:
    batch = batch_of([[4], [3, 1], [5], [3], [1]])
    for most, lengths in ((8, [8, 8, 1]), (7, [4, 4, 5, 4]), (9, [8, 9]), (100, [17]), (1, [4, 4, 5, 3, 1])):
        plan = plan_step(0, batch, 0, 1, most, 1e-3)
        assert [len(part.token_T) for part in plan.micro_batches if part is not None] == lengths


def test_without_dropping_nothing_is_protected() -> None:
    assert plan_step(0, batch_of([[3]]), 0, 1, 8, 1e-3).protected == ()
