"""Which tokens a step computes: bounds, chunks, order, preemption and cancellation."""

import itertools
import random

import pytest

from attention.blocks import BlockPool
from attention.requests import GenerateRequest, SamplingParams
from attention.scheduler import Scheduler, SchedulerLimits
from attention.sequence import Sequence

SIZE = 4


def sequence(number: int, length: int, prompt: list[int] | None = None) -> Sequence:
    tokens = tuple(prompt or [1000 * number + index for index in range(length)])
    return Sequence(GenerateRequest(f"r{number}", tokens, SamplingParams(max_tokens=100)), number)


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step; sequences that reached their end get a token."""
    chunks = scheduler.schedule()
    scheduler.complete(chunks)
    planned = [(chunk.sequence.id, chunk.start, chunk.count) for chunk in chunks]
    for chunk in chunks:
        if chunk.samples:
            chunk.sequence.tokens.append(7)
    return planned


def test_a_long_prompt_is_computed_in_chunks_beside_others() -> None:
    scheduler = Scheduler(BlockPool(64, SIZE), SchedulerLimits(step_tokens=8, running=4))
    scheduler.add(sequence(1, 3))
    scheduler.add(sequence(2, 20))
    assert step(scheduler) == [("r1", 0, 3), ("r2", 0, 5)]
    assert step(scheduler) == [("r1", 3, 1), ("r2", 5, 7)]
    assert step(scheduler) == [("r1", 4, 1), ("r2", 12, 7)]
    assert step(scheduler) == [("r1", 5, 1), ("r2", 19, 1)]
    assert step(scheduler) == [("r1", 6, 1), ("r2", 20, 1)]


def test_a_short_prompt_does_not_wait_until_long_ones_are_through() -> None:
    scheduler = Scheduler(BlockPool(256, SIZE), SchedulerLimits(step_tokens=16, running=8))
    for number in (1, 2):
        scheduler.add(sequence(number, 60))
    assert step(scheduler) == [("r1", 0, 16)]
    scheduler.add(sequence(3, 3))
    scheduler.add(sequence(4, 4))
    assert step(scheduler) == [("r1", 16, 12), ("r3", 0, 3), ("r4", 0, 1)]
    assert step(scheduler) == [("r1", 28, 12), ("r3", 3, 1), ("r4", 1, 3)]
    assert step(scheduler) == [("r1", 40, 14), ("r3", 4, 1), ("r4", 4, 1)]  # answers go on beside it
    assert step(scheduler) == [("r1", 54, 6), ("r3", 5, 1), ("r4", 5, 1), ("r2", 0, 8)]


def test_a_long_prompt_whose_beginning_is_cached_is_short() -> None:
    scheduler = Scheduler(BlockPool(256, SIZE), SchedulerLimits(step_tokens=16, running=8))
    before = sequence(1, 0, list(range(40)))
    scheduler.add(before)
    for _ in range(3):
        step(scheduler)
    scheduler.remove(before)
    scheduler.add(sequence(2, 60))
    step(scheduler)
    scheduler.add(sequence(3, 0, [*range(40), 99, 98]))
    assert step(scheduler) == [("r2", 16, 14), ("r3", 40, 2)]


def test_a_prompt_for_which_there_is_no_room_is_not_begun_again_and_again() -> None:
    """It would take blocks for a first part, give them up for want of more, and compute that part once more."""
    pool = BlockPool(8, SIZE)
    scheduler = Scheduler(pool, SchedulerLimits(step_tokens=8, running=4))
    takes, waits = sequence(1, 14), sequence(2, 24)
    scheduler.add(takes)
    step(scheduler)
    step(scheduler)
    scheduler.add(waits)
    for _ in range(8):
        assert [name for name, _, _ in step(scheduler)] == ["r1"]
    assert scheduler.preemptions == 0
    scheduler.remove(takes)
    assert step(scheduler) == [("r2", 0, 8)]


def test_nothing_is_kept_for_a_short_prompt_that_cannot_come_in() -> None:
    """It waits behind one for which there is no room."""
    scheduler = Scheduler(BlockPool(20, SIZE), SchedulerLimits(step_tokens=16, running=8))
    scheduler.add(sequence(1, 60))
    assert step(scheduler) == [("r1", 0, 16)]
    scheduler.add(sequence(2, 70))
    scheduler.add(sequence(3, 3))
    assert step(scheduler) == [("r1", 16, 16)]


@pytest.mark.parametrize(("step_tokens", "running", "others"), [(16, 64, 20), (16, 24, 30)])
def test_a_long_prompt_gets_on_while_answers_fill_the_steps(step_tokens: int, running: int, others: int) -> None:
    """As one answer ends, the next short prompt comes, and never is there a step that these would not fill."""
    scheduler = Scheduler(BlockPool(256, SIZE), SchedulerLimits(step_tokens=step_tokens, running=running))
    numbers = itertools.count()
    answers = [sequence(next(numbers), 2) for _ in range(others)]
    for answer in answers:
        scheduler.add(answer)
    step(scheduler)
    long = sequence(next(numbers), 40)
    scheduler.add(long)
    for _ in range(200):
        step(scheduler)
        for index, answer in enumerate(answers):
            if answer.generated >= 12:
                scheduler.remove(answer)
                answers[index] = sequence(next(numbers), 2)
                scheduler.add(answers[index])
    assert long.generated


def test_no_more_run_than_allowed() -> None:
    scheduler = Scheduler(BlockPool(64, SIZE), SchedulerLimits(step_tokens=100, running=2))
    for number in range(3):
        scheduler.add(sequence(number, 4))
    assert len(step(scheduler)) == 2
    assert (scheduler.running, scheduler.waiting) == (2, 1)


def test_an_equal_prefix_is_not_computed_again() -> None:
    scheduler = Scheduler(BlockPool(64, SIZE), SchedulerLimits())
    scheduler.add(sequence(1, 0, list(range(10))))
    step(scheduler)
    scheduler.add(sequence(2, 0, [*range(8), 50]))
    scheduler.add(sequence(3, 0, list(range(8))))  # the last token is computed, for its logits
    assert step(scheduler)[1:] == [("r2", 8, 1), ("r3", 4, 4)]


def test_what_was_cached_is_told_of_the_prefix_that_was_used() -> None:
    """Not of one that was there while the sequence waited for room, and went meanwhile."""
    pool = BlockPool(6, SIZE)
    scheduler = Scheduler(pool, SchedulerLimits(step_tokens=64, running=4))
    before = sequence(1, 0, list(range(8)))
    scheduler.add(before)
    step(scheduler)
    scheduler.remove(before)  # its two blocks stay cached
    takes_all, waits = sequence(2, 16), sequence(3, 0, [*range(8), *range(50, 62)])
    scheduler.add(takes_all)
    step(scheduler)
    scheduler.add(waits)
    for _ in range(6):
        step(scheduler)  # one needs block after block, which the cached ones give way to
    assert waits.cached_tokens is None
    scheduler.remove(takes_all)
    step(scheduler)
    assert waits.cached_tokens == 0


def test_the_latest_gives_way_and_comes_back() -> None:
    pool = BlockPool(6, SIZE)
    scheduler = Scheduler(pool, SchedulerLimits(step_tokens=64, running=4))
    first, second = sequence(1, 10), sequence(2, 11)
    scheduler.add(first)
    scheduler.add(second)
    ran: list[set[str]] = []
    for _ in range(8):
        ran.append({name for name, _, _ in step(scheduler)})
    assert scheduler.preemptions == 1
    assert all("r1" in names for names in ran)
    assert "r2" not in ran[-1]
    scheduler.remove(first)
    before = len(second.tokens)
    step(scheduler)
    assert second.computed == before  # all of it is there again


def test_cancelling_frees_blocks_in_any_state() -> None:
    pool = BlockPool(6, SIZE)
    scheduler = Scheduler(pool, SchedulerLimits(step_tokens=64, running=1))
    running, waiting = sequence(1, 10), sequence(2, 11)
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    assert pool.owned == 3
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert (pool.owned, scheduler.running, scheduler.waiting) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(15))
def test_everyone_finishes_within_the_bounds_whatever_the_mix(seed: int) -> None:
    rng = random.Random(seed)
    limits = SchedulerLimits(step_tokens=rng.randint(1, 30), running=rng.randint(1, 6))
    pool = BlockPool(rng.randint(12, 30), SIZE)
    scheduler = Scheduler(pool, limits)
    live: dict[str, Sequence] = {}
    for number in range(12):
        made = sequence(number, 0, [rng.randrange(2) for _ in range(rng.randint(1, 24))])
        live[made.id] = made
        scheduler.add(made)
    computed: dict[str, int] = {}
    for _ in range(3000):
        if not live:
            break
        chunks = scheduler.schedule()
        assert sum(chunk.count for chunk in chunks) <= limits.step_tokens
        assert len(chunks) <= limits.running
        assert chunks, "work is left and nothing was planned"
        for chunk in chunks:
            assert chunk.count > 0
            assert chunk.start == chunk.sequence.computed
            assert len(chunk.sequence.blocks) * SIZE >= chunk.end
            computed[chunk.sequence.id] = chunk.end
        scheduler.complete(chunks)
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(rng.randrange(2))
                if chunk.sequence.generated >= 20 or rng.random() < 0.02:
                    scheduler.remove(live.pop(chunk.sequence.id))
    assert not live
    assert pool.owned == 0


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="step_tokens 0"):
        SchedulerLimits(step_tokens=0)
