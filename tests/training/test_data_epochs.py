"""With `epochs` each sample is learned from as often as the recipe says, and no batch has it twice."""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.training.data.training_data import TrainingData
from services.training.inputs import count_steps
from services.training.recipe import Recipe, parse_recipe
from services.training.schedule import batch_tokens
from tests.training.test_data_order import LENGTH, LENGTHS, SEEDS, data_of

EPOCHS = st.integers(1, 40).map(lambda tenths: tenths / 10)
BUDGET = st.integers(LENGTH, 5 * LENGTH)
BUDGETS = st.lists(BUDGET, min_size=1, max_size=3)


def ending(lengths: list[int], epochs: float, seed: int = 0) -> TrainingData:
    samples = data_of(lengths, seed=seed).samples
    return TrainingData(samples, LENGTH, True, seed, epochs)


def recipe_of(epochs: float, budgets: list[int], **given: Any) -> Recipe:
    stages = [{"from_step": step, "tokens": tokens} for step, tokens in enumerate(budgets)]
    data = {"files": ["d"], "sequence_length": LENGTH}
    sizes = {"batch_stages": stages, "micro_batch_tokens": LENGTH}
    return parse_recipe({"model": "m", "output_dir": "o", "data": data, "epochs": epochs, **sizes, **given})


@given(lengths=LENGTHS, epochs=EPOCHS, budget=BUDGET, seed=SEEDS)
def test_each_sample_is_learned_from_as_often_as_the_recipe_says(
    lengths: list[int], epochs: float, budget: int, seed: int
) -> None:
    data = ending(lengths, epochs, seed)
    seen: Counter[int] = Counter()
    cursor = 0
    for _ in range(count_steps(recipe_of(epochs, [budget]), data)):
        batch = data.batch(cursor, batch_tokens=budget)
        assert batch.samples
        assert len(set(batch.samples)) == len(batch.samples)
        assert batch.cursor_after == data.after(cursor, budget)
        cursor = batch.cursor_after
        seen.update(batch.samples)
    assert cursor == data.end == math.ceil(round(epochs * 10) * len(lengths) / 10)
    assert set(seen.values()) <= {math.floor(epochs), math.ceil(epochs)}


@given(lengths=LENGTHS, epochs=EPOCHS, taken=st.floats(0, 1, exclude_max=True), budget=BUDGET)
def test_a_batch_is_the_endless_datas_up_to_a_border(
    lengths: list[int], epochs: float, taken: float, budget: int
) -> None:
    """From any cursor, without what came before: as a resumed run asks."""
    data = ending(lengths, epochs)
    assert data.end is not None
    cursor = int(taken * data.end)
    whole = data_of(lengths).batch(cursor, batch_tokens=budget).samples
    border = min(data.end, (cursor // len(lengths) + 1) * len(lengths))
    assert data.batch(cursor, batch_tokens=budget).samples == whole[: border - cursor]


def test_a_batch_larger_than_the_data_is_an_epoch() -> None:
    data = ending([2] * 5, 1)
    assert count_steps(recipe_of(1, [10 * LENGTH]), data) == 1
    assert sorted(data.batch(0, batch_tokens=10 * LENGTH).samples) == list(range(5))


def test_part_of_an_epoch_is_rounded_up_to_a_sample_and_not_by_a_floats_last_bit() -> None:
    assert [ending([4] * 10, epochs).end for epochs in (0.01, 0.95, 1.1, 2)] == [1, 10, 11, 20]


def test_beyond_the_end_a_run_goes_on_with_the_epoch() -> None:
    """A resumed run has as many steps as its batches would have made of all the data."""
    data = ending([4] * 10, 1.5)
    for cursor in (15, 17, 20):
        assert data.batch(cursor, batch_tokens=2 * LENGTH).samples


def test_without_an_end_one_epoch_follows_another_within_a_batch() -> None:
    assert data_of([4] * 5).batch(3, batch_tokens=LENGTH).epoch == 1.4


@given(lengths=LENGTHS, epochs=EPOCHS, budgets=BUDGETS)
def test_steps_are_counted_with_the_batches_that_are_made(
    lengths: list[int], epochs: float, budgets: list[int]
) -> None:
    data, recipe = ending(lengths, epochs), recipe_of(epochs, budgets)
    cursor, steps = 0, 0
    while cursor < (data.end or 0):
        cursor = data.batch(cursor, batch_tokens=batch_tokens(recipe.stages, steps)).cursor_after
        steps += 1
    if len(budgets) <= steps:
        assert count_steps(recipe, data) == steps
    else:
        with pytest.raises(ValueError, match=f"one from step {steps} on and the run has {steps} steps"):
            count_steps(recipe, data)


def test_a_warm_up_that_takes_all_steps_is_refused() -> None:
    data = ending([4] * 10, 1)
    assert count_steps(recipe_of(1, [LENGTH], warmup_steps=2), data) == 3
    with pytest.raises(ValueError, match="warmup_steps is 3 and the run has 3 steps; expected less"):
        count_steps(recipe_of(1, [LENGTH], warmup_steps=3), data)
