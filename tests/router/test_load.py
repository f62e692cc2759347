"""Load statistics: every row is counted once, and old ones fade."""

import threading
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.load import LoadMeter
from router.load_book import LoadBook


def test_rows_are_counted_by_layer_and_expert_and_taken_once() -> None:
    meter = LoadMeter([1, 3], experts=4)
    meter.count(1, torch.tensor([[0, 3], [3, 1]]))
    meter.count(3, torch.tensor([[2, 1]], dtype=torch.int32))
    meter.count(1, torch.tensor([[3, 0]]))
    assert meter.take() == {1: [2, 1, 0, 3], 3: [0, 1, 1, 0]}
    assert meter.take() == {1: [0] * 4, 3: [0] * 4}
    meter.count(3, torch.empty(0, 2, dtype=torch.int64))
    meter.count(3, torch.tensor([[2, 2]]))
    assert meter.take() == {1: [0] * 4, 3: [0, 0, 2, 0]}


def test_layer_without_routed_experts_is_unknown() -> None:
    with pytest.raises(KeyError):
        LoadMeter([1], experts=4).count(0, torch.tensor([[0]]))


def test_taking_while_counting_loses_nothing_and_counts_nothing_twice() -> None:
    meter, rounds = LoadMeter([0, 1], experts=8), 3000
    choices = torch.arange(16).reshape(4, 4) % 8
    done = threading.Event()

    def count() -> None:
        for _ in range(rounds):
            meter.count(0, choices)
            meter.count(1, choices[:1])
        done.set()

    thread = threading.Thread(target=count)
    thread.start()
    totals: Counter[tuple[int, int]] = Counter()
    last = False
    while not last:
        last = done.is_set()
        for layer, rows in meter.take().items():
            assert min(rows) >= 0
            for expert, value in enumerate(rows):
                totals[layer, expert] += value
    thread.join()
    wanted = {(0, expert): 2 * rounds for expert in range(8)} | {
        (1, expert): rounds * (expert < 4) for expert in range(8)
    }
    assert dict(totals) == wanted


def test_half_is_forgotten_in_a_half_life() -> None:
    book = LoadBook([2], experts=2, half_life_s=10.0)
    assert book.loads(5.0) == {2: (0.0, 0.0)}
    assert book.total(5.0) == 0.0
    book.add({2: [8, 0]}, now_s=100.0)
    assert book.loads(100.0) == {2: (8.0, 0.0)}
    assert book.loads(110.0) == {2: (4.0, 0.0)}
    book.add({2: [0, 4]}, now_s=120.0)
    assert book.loads(130.0) == {2: (1.0, 2.0)}
    assert book.total(130.0) == 3.0


@given(st.lists(st.tuples(st.floats(0, 50), st.lists(st.integers(0, 99), min_size=3, max_size=3)), max_size=8))
def test_loads_are_the_sum_of_what_each_count_is_still_worth(added: list[tuple[float, list[int]]]) -> None:
    book, now_s = LoadBook([0], experts=3, half_life_s=7.0), 0.0
    wanted = [0.0] * 3
    for later_s, rows in added:
        now_s += later_s
        book.add({0: rows}, now_s)
        wanted = [value * 2 ** (-later_s / 7.0) + new for value, new in zip(wanted, rows, strict=True)]
    assert book.loads(now_s)[0] == pytest.approx(wanted)


def test_asking_changes_nothing() -> None:
    book = LoadBook([0], experts=1, half_life_s=1.0)
    book.add({0: [8]}, 0.0)
    assert [book.total(3.0), book.total(3.0), book.total(1.0)] == [1.0, 1.0, 4.0]


def test_layers_without_counts_age_too() -> None:
    book = LoadBook([0, 1], experts=1, half_life_s=1.0)
    book.add({0: [8]}, 0.0)
    book.add({1: [8]}, 1.0)
    assert book.loads(1.0) == {0: (4.0,), 1: (8.0,)}


def test_clock_that_goes_back_ages_nothing() -> None:
    book = LoadBook([0], experts=1, half_life_s=1.0)
    book.add({0: [8]}, 10.0)
    book.add({0: [8]}, 9.0)
    assert book.total(9.0) == book.total(10.0) == 16.0
    assert book.total(11.0) == 8.0


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({7: [1, 1]}, r"counts of layer 7; the book has layers \[0, 1\]"),
        ({0: [1, 1], 1: [1]}, "layer 1 has counts of 1 experts; expected 2"),
    ],
)
def test_counts_of_another_model_are_refused_and_leave_no_trace(counts: dict[int, list[int]], message: str) -> None:
    book = LoadBook([0, 1], experts=2)
    with pytest.raises(ValueError, match=message):
        book.add(counts, 1.0)
    assert book.total(1.0) == 0.0


def test_half_life_is_more_than_nothing() -> None:
    with pytest.raises(ValueError, match=r"half_life_s is 0.0; expected more than 0"):
        LoadBook([0], experts=1, half_life_s=0.0)
