"""Order: a batch is a function of seed and cursor; each sample comes once an epoch, whoever computes it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.training.data.order import SampleOrder
from services.training.data.packing import PackedRow
from services.training.data.rendering import Tokens
from services.training.data.samples import SampleSetBuilder
from services.training.data.training_data import GlobalBatch, TrainingData

LENGTH = 16


def data_of(lengths: list[int], packing: bool = True, seed: int = 0) -> TrainingData:
    """Sample i is the token i, as often as it is long; all of it is learned."""
    builder = SampleSetBuilder()
    for index, length in enumerate(lengths):
        ids_T = np.full(length, index, dtype=np.int32)
        builder.add(Tokens(ids_T, np.ones(length, dtype=np.bool_)), index + 1, 0)
    return TrainingData(builder.build(), LENGTH, packing, seed)


def alike(one: PackedRow, other: PackedRow) -> bool:
    arrays = ("token_T", "target_T", "position_T")
    return one.segment_ends == other.segment_ends and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


LENGTHS = st.lists(st.integers(2, LENGTH), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**64 - 1)
BUDGET = st.fixed_dictionaries({"batch_samples": st.integers(1, 15)}) | st.fixed_dictionaries(
    {"batch_tokens": st.integers(LENGTH, 5 * LENGTH)}
)


def test_permutation_is_pinned() -> None:
    """A resumed run must go on in the order in which it began, also with other versions of everything."""
    order = SampleOrder(2405, 8)
    first, second = [3, 2, 6, 7, 5, 1, 0, 4], [6, 5, 0, 1, 4, 3, 2, 7]
    assert [order.permutation(epoch).tolist() for epoch in (0, 1, 0)] == [first, second, first]


@given(seed=SEEDS, count=st.integers(1, 40), epoch=st.integers(0, 10**6))
def test_epoch_is_a_permutation(seed: int, count: int, epoch: int) -> None:
    assert sorted(SampleOrder(seed, count).permutation(epoch).tolist()) == list(range(count))


def test_epochs_and_seeds_differ_and_no_global_generator_matters() -> None:
    np.random.seed(1)
    orders = {tuple(SampleOrder(seed, 50).permutation(epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    np.random.seed(2)
    assert tuple(SampleOrder(3, 50).permutation(4)) in orders


def test_every_place_is_equally_likely() -> None:
    """Of 2000 epochs of 5 samples; five standard deviations from the mean are a chance of one in a million."""
    seen = Counter(
        (place, int(index)) for epoch in range(2000) for place, index in enumerate(SampleOrder(0, 5).permutation(epoch))
    )
    assert all(
        abs(seen[place, index] - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5 for place in range(5) for index in range(5)
    )


@given(lengths=LENGTHS, seed=SEEDS, steps=st.lists(st.tuples(st.integers(1, 9), BUDGET), max_size=12))
def test_each_sample_comes_once_an_epoch_at_any_sequence_of_worker_counts(
    lengths: list[int], seed: int, steps: list[tuple[int, dict[str, int]]]
) -> None:
    data = data_of(lengths, seed=seed)
    cursor, computed = 0, []
    for world, budget in steps:
        batch = data.batch(cursor, **budget)
        dealt = [batch.rows[number] for rank in range(world) for number in batch.dealt(rank, world)]
        # What the workers got, put into the order of the batch: by the tokens themselves, not by what the rows say.
        got = Counter(token for row in dealt for token in row.token_T.tolist())
        taken = Counter(batch.samples)
        assert got == Counter({index: times * lengths[index] for index, times in taken.items()})
        computed += batch.samples
        assert batch.cursor_after == cursor + len(batch.samples)
        if "batch_tokens" in budget:
            assert data.after(cursor, budget["batch_tokens"]) == batch.cursor_after
        assert batch.epoch == batch.cursor_after / len(lengths)
        cursor = batch.cursor_after
    count = len(lengths)
    for epoch in range(len(computed) // count):
        assert sorted(computed[epoch * count : (epoch + 1) * count]) == list(range(count))
    rest = computed[len(computed) // count * count :]
    assert len(set(rest)) == len(rest)


@given(lengths=LENGTHS, cursor=st.integers(0, 40), budget=BUDGET, world=st.integers(1, 9), packing=st.booleans())
def test_batch_does_not_depend_on_the_workers(
    lengths: list[int], cursor: int, budget: dict[str, int], world: int, packing: bool
) -> None:
    """Nor on what was asked for before: a data set that was just loaded gives the same."""
    data = data_of(lengths, packing)
    data.batch(cursor + 7, **budget)
    batch = data.batch(cursor, **budget)
    shares = [[batch.rows[number] for number in batch.dealt(rank, world)] for rank in range(world)]
    again = data_of(lengths, packing).batch(cursor, **budget)
    assert batch.samples == again.samples
    assert len(batch.rows) == len(again.rows) == sum(map(len, shares))
    for place, row in enumerate(again.rows):
        assert alike(row, shares[place % world][place // world])
    assert sum(row.targets for share in shares for row in share) == batch.targets
    assert batch.targets == sum(lengths[index] - 1 for index in batch.samples)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(lengths=LENGTHS, cursor=st.integers(0, 40), budget=st.integers(LENGTH, 4 * LENGTH))
def test_token_budget_is_filled_in_order(lengths: list[int], cursor: int, budget: int) -> None:
    data = data_of(lengths)
    batch = data.batch(cursor, batch_tokens=budget)
    following = data.batch(cursor, batch_samples=len(batch.samples) + 1).samples
    assert batch.samples == following[:-1]
    assert sum(lengths[index] for index in following[:-1]) <= budget < sum(lengths[index] for index in following)


@given(lengths=LENGTHS, count=st.integers(1, 40), cut=st.integers(0, 40))
def test_a_batch_is_the_batches_that_it_could_be_cut_into(lengths: list[int], count: int, cut: int) -> None:
    """Across the borders of epochs, too."""
    data = data_of(lengths)
    whole = data.batch(3, batch_samples=count + cut + 1).samples
    first = data.batch(3, batch_samples=count)
    assert whole == first.samples + data.batch(first.cursor_after, batch_samples=cut + 1).samples


def test_last_batch_of_an_epoch_runs_into_the_next() -> None:
    data = data_of([4] * 5)
    batch = data.batch(3, batch_samples=4)
    first, second = data.order.permutation(0).tolist(), data.order.permutation(1).tolist()
    assert batch.samples == (*first[3:], *second[:2])
    assert (batch.cursor_after, batch.epoch) == (7, 1.4)
    assert data.batch(5, batch_samples=5).samples == tuple(second)


@given(lengths=LENGTHS, count=st.integers(1, 30))
def test_rows_hold_whole_samples_with_packing_and_without(lengths: list[int], count: int) -> None:
    for packing in (True, False):
        batch: GlobalBatch = data_of(lengths, packing).batch(0, batch_samples=count)
        segments = []
        for row in batch.rows:
            assert len(row.token_T) == row.segment_ends[-1] <= LENGTH
            for begin, end in zip((0, *row.segment_ends), row.segment_ends, strict=False):
                [index] = set(row.token_T[begin:end].tolist())
                assert end - begin == lengths[index]
                segments.append(index)
        assert Counter(segments) == Counter(batch.samples)
        if not packing:
            assert tuple(segments) == batch.samples
            assert all(len(row.segment_ends) == 1 for row in batch.rows)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, "exactly one"),
        ({"batch_samples": 1, "batch_tokens": 99}, "exactly one"),
        ({"batch_samples": 0}, "at least 1"),
        ({"batch_tokens": LENGTH - 1}, r"at least sequence_length \(16\)"),
    ],
)
def test_wrong_budget_is_refused(budget: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data_of([4]).batch(0, **budget)


def test_wrong_cursor_seed_and_rank_are_refused() -> None:
    data = data_of([4, 4])
    with pytest.raises(ValueError, match="cursor -1"):
        data.batch(-1, batch_samples=1)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank"):
            data.batch(0, batch_samples=2).dealt(rank, world)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            SampleOrder(seed, 1)
    with pytest.raises(ValueError, match="0 samples"):
        SampleOrder(0, 0)
