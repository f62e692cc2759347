"""Rates from arrivals: one definition, whoever batches how."""

import pytest

from bench.prompts import draw_prompts
from bench.timing import GenerationClock, Workload, agreement


def clock(batch: int, decode_tokens: int) -> GenerationClock:
    return GenerationClock(Workload(((7,) * 4,) * batch, decode_tokens), 100.0)


def test_lockstep_rates() -> None:
    told = clock(batch=2, decode_tokens=3)
    for step in range(4):
        for place in range(2):
            told.add(place, (step,), 102.0 + step)
    sample = told.sample()
    assert sample.prefill_tokens_per_s == 2 * 4 / 2.0
    assert sample.decode_tokens_per_s == 2 * 3 / 3.0
    assert sample.answers == ((0, 1, 2, 3), (0, 1, 2, 3))


def test_tokens_made_while_another_prompt_is_computed_are_not_counted() -> None:
    told = clock(batch=2, decode_tokens=2)
    for at_s, place in ((101.0, 0), (102.0, 0), (103.0, 0), (104.0, 1)):
        told.add(place, (9,), at_s)
    assert not told.done
    for at_s in (105.0, 106.0):
        told.add(0, (9,), at_s)
        assert not told.done
        told.add(1, (9,), at_s)
    sample = told.sample()
    assert (sample.prefill_s, sample.decode_s, sample.decode_tokens) == (4.0, 2.0, 4)


def test_what_comes_after_the_end_changes_nothing() -> None:
    told = clock(batch=1, decode_tokens=1)
    told.add(0, (1, 2), 101.0)
    ended = told.sample()
    told.add(0, (3,), 109.0)
    assert told.sample() == ended


def test_an_unfinished_measurement_has_no_rates() -> None:
    told = clock(batch=1, decode_tokens=2)
    told.add(0, (1, 2), 101.0)
    with pytest.raises(ValueError, match="not over"):
        told.sample()


def test_a_continuous_batcher_is_asked_for_enough_tokens() -> None:
    workload = Workload(((7,),) * 32, 16)
    told = GenerationClock(workload, 0.0)
    for place in range(32):  # one prompt a step, everybody before it generates meanwhile
        for earlier in range(place + 1):
            told.add(earlier, (1,), float(place))
    for step in range(16):
        for place in range(32):
            told.add(place, (1,), 32.0 + step)
    assert told.done
    assert workload.most_tokens >= 32 + 16


def test_prompts_are_repeatable_and_share_no_beginning() -> None:
    first = draw_prompts("a", 8, 16, 1000)
    assert first == draw_prompts("a", 8, 16, 1000)
    assert len({prompt[:2] for prompt in (*first, *draw_prompts("b", 8, 16, 1000))}) == 16
    assert all(2 <= token < 1000 for prompt in first for token in prompt)


def test_agreement_counts_whole_answers() -> None:
    assert agreement(((1, 2), (3, 4)), ((1, 2), (3, 5))) == 0.5
