"""Draws: against slow oracles, with the right frequencies, and a function of seed and position alone."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from attention.requests import SamplingParams
from attention.sampling import Draw, _inverse, draw_all, forbid, penalised, score, uniform


def params(**changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=1, **changes)  # type: ignore[arg-type]


def draw(logits_V: torch.Tensor, chosen: SamplingParams, position: int) -> int:
    """By itself."""
    return draw_all([Draw(logits_V, chosen, position)])[0]


def logits(seed: int, size: int = 12) -> torch.Tensor:
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def slow_distribution(values: list[float], chosen: SamplingParams) -> list[float]:
    """Temperature, then top_k, then top_p of what is left, then min_p, in plain Python."""
    top = max(values)
    weights = [math.exp((value - top) / chosen.temperature) for value in values]
    order = sorted(range(len(values)), key=lambda token: (-weights[token], token))
    kept = order[: chosen.top_k] if chosen.top_k else order
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before / total < chosen.top_p:
            nucleus.append(token)
        before += weights[token]
    final = [token for token in nucleus if weights[token] >= chosen.min_p * weights[order[0]]]
    mass = sum(weights[token] for token in final)
    return [weights[token] / mass if token in final else 0.0 for token in range(len(values))]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3},
    ],
)
def test_tokens_come_as_often_as_they_should(changes: dict[str, float]) -> None:
    chosen = params(seed=5, **changes)
    values = logits(1)
    expected = slow_distribution(values.tolist(), chosen)
    draws = 4000
    counts = Counter(draw(values, chosen, position) for position in range(draws))
    assert all(expected[token] > 0 for token in counts)
    for token, probability in enumerate(expected):
        spread = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) <= 4.5 * spread + 1e-9


@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.9},
        {"top_p": 0.9, "temperature": 2.0},
        {"top_p": 0.999, "temperature": 2.0},
        {"min_p": 0.3},
        {"min_p": 1e-4, "temperature": 2.0},
        {"top_k": 40},
        {"top_k": 300, "top_p": 0.5, "min_p": 0.1},
        {"top_k": 2999, "top_p": 0.7, "temperature": 2.0},
        {"top_k": 5000, "top_p": 0.7},
    ],
)
@pytest.mark.parametrize("step", [None, 0.25], ids=["all different", "many equal"])
def test_of_a_large_vocabulary_the_same_tokens_are_drawn_as_by_the_formula(
    changes: dict[str, float], step: float | None
) -> None:
    """Whether the likeliest few hold enough, or all of it has to be sorted."""
    chosen = params(seed=11, **changes)
    for seed in range(3):
        values = logits(seed, 3000)
        if step is not None:
            values = (values / step).round() * step
        weights = slow_distribution(values.tolist(), chosen)
        order = sorted((token for token in range(3000) if weights[token]), key=lambda token: (-weights[token], token))
        for position in range(60):
            left = uniform(11, position)
            for token in order:
                left -= weights[token]
                if left < 0:
                    break
            assert draw(values, chosen, position) == token


def test_greedy_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    values = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert draw(values, params(temperature=0.0), 9) == 1


@pytest.mark.parametrize("narrow", [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.01, "min_p": 0.5}])
@pytest.mark.parametrize("size", [12, 3000])
def test_the_narrowest_choice_is_the_likeliest_token_alone(narrow: dict[str, float], size: int) -> None:
    values = logits(5, size)
    best = int(values.argmax())
    assert {draw(values, params(seed=seed, **narrow), 1) for seed in range(200)} == {best}


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    values = logits(2, 500)
    once = [draw(values, params(seed=3), position) for position in range(50)]
    backwards = [draw(values, params(seed=3), position) for position in reversed(range(50))]
    assert once == backwards[::-1]
    assert once != [draw(values, params(seed=4), position) for position in range(50)]
    assert len(set(once)) > 10


def test_a_draw_is_the_same_whatever_is_drawn_with_it() -> None:
    """Of few and many tokens, equal ones among them, as floats and, once penalised, as doubles."""
    ways: list[dict[str, object]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.9, "temperature": 2.0},
        {"top_k": 40},
        {"top_k": 1023, "min_p": 0.01},
        {"top_k": 2000},
        {"min_p": 0.2},
    ]
    for size in (12, 3000):
        draws = []
        for place in range(4 * len(ways)):
            values = logits(place, size)
            values = (4 * values).round() / 4 if place % 3 else values
            values = values.double() if place % 5 == 4 else values
            draws.append(Draw(values, params(seed=place, **ways[place % len(ways)]), position=place % 7))
        together = draw_all(draws)
        assert together == [draw(one.logits_V, one.params, one.position) for one in draws]
        assert draw_all(draws[::-1]) == together[::-1]
        assert len(set(together)) > 5
    assert draw_all([]) == []


@pytest.mark.parametrize("narrow", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
@pytest.mark.parametrize("size", [12, 3000])
def test_logits_that_are_no_numbers_spoil_their_own_draw_alone(narrow: dict[str, float], size: int) -> None:
    good, spoilt = logits(1, size), logits(2, size)
    spoilt[3] = torch.nan
    chosen = params(seed=1, **narrow)
    found = draw_all([Draw(spoilt, chosen, 5), Draw(good, chosen, 5)])
    assert 0 <= found[0] < size
    assert found[1] == draw(good, chosen, 5)


def test_uniform_numbers_fill_the_interval() -> None:
    numbers = [uniform(seed, position) for seed in range(40) for position in range(50)]
    counts = Counter(int(10 * number) for number in numbers)
    assert set(counts) == set(range(10))
    assert all(abs(count - 200) < 4.5 * math.sqrt(200 * 0.9) for count in counts.values())


def test_what_is_not_penalised_is_left_alone() -> None:
    values = logits(3)
    assert penalised(values, [1], [2], params()) is values
    for one in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}):
        assert params(**one).penalises
    before = values.clone()
    penalised(values, [1], [2], params(repetition_penalty=2.0, logit_bias=((3, 1.0),)))
    assert torch.equal(values, before)


def test_penalties_and_bias_match_their_formulas() -> None:
    values = logits(3).tolist()
    prompt, answer = [1, 1, 4], [2, 2, 2, 5, 4]
    chosen = params(
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.25, logit_bias=((0, 5.0), (5, -100.0))
    )
    expected = list(values)
    for token in range(len(values)):
        if token in prompt + answer:
            expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
        expected[token] -= 0.25 * answer.count(token) + 0.4 * (token in answer)
    expected[0] += 5.0
    expected[5] -= 100.0
    got = penalised(torch.tensor(values), prompt, answer, chosen)
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        ({"presence_penalty": 0.5}, [1.0, -2.0, 1.5, -1.5, 3.0]),
        ({"frequency_penalty": 0.5}, [1.0, -2.0, 0.5, -1.5, 3.0]),
        ({"presence_penalty": -0.5}, [1.0, -2.0, 2.5, -0.5, 3.0]),
        ({"repetition_penalty": 2.0}, [0.5, -4.0, 1.0, -2.0, 3.0]),
        ({"logit_bias": ((4, -1.0), (0, 2.0))}, [3.0, -2.0, 2.0, -1.0, 2.0]),
    ],
)
def test_each_penalty_alone_does_its_own(one: dict[str, object], expected: list[float]) -> None:
    values = torch.tensor([1.0, -2.0, 2.0, -1.0, 3.0])
    assert penalised(values, [0, 1], [2, 2, 2, 3], params(**one)).tolist() == expected


def test_forbidden_tokens_are_never_drawn() -> None:
    values = forbid(torch.tensor([9.0, 1.0, 1.0]), [0])
    assert {draw(values, params(), position) for position in range(100)} == {1, 2}
    assert draw(values, params(temperature=0.0), 0) == 1


def test_a_draw_at_the_very_end_of_the_mass_is_a_token_that_has_some() -> None:
    """Where the product of the total and a number below 1 is rounded up to the total."""
    just_below = 1 - 2.0**-53
    assert _inverse(np.array([0.5, 0.25, 0.0, 0.0]), just_below) == 1
    assert _inverse(np.array([0.0, 3e-324]), just_below) == 1
    assert _inverse(np.array([0.0, 3e-324, 0.0]), just_below) == 1


def test_scores_are_of_the_models_own_distribution() -> None:
    values = logits(4)
    scored = score(values, token=7, alternatives=3)
    expected = torch.log_softmax(values.double(), -1)
    assert scored.logprob == pytest.approx(float(expected[7]))
    best = sorted(range(12), key=lambda token: -float(expected[token]))[:3]
    assert [token for token, _ in scored.top] == best
    assert [value for _, value in scored.top] == pytest.approx([float(expected[token]) for token in best])


def test_more_alternatives_than_there_are_tokens_are_all_of_them() -> None:
    scored = score(logits(4), token=7, alternatives=20)
    assert sorted(token for token, _ in scored.top) == list(range(12))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 1 << 63),
        ("logit_bias", ((1, math.inf),)),
        ("logprobs", -1),
        ("min_tokens", 2),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**({"max_tokens": 1} | {field: value}))  # type: ignore[arg-type]
