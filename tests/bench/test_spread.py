"""Medians, quartiles, and ratios that are formed before they are summarised."""

import pytest

from bench.spread import percentile, ratio, spread


def test_a_spread_has_median_quartiles_and_range() -> None:
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.minimum, found.first_quartile, found.median, found.third_quartile, found.maximum) == (1, 2, 3, 4, 5)
    assert found.samples == (5.0, 1.0, 4.0, 2.0, 3.0)


def test_a_percentile_lies_between_samples() -> None:
    assert percentile([10.0, 20.0], 50) == 15.0
    assert percentile([10.0], 99) == 10.0
    assert percentile(list(map(float, range(101))), 99) == 99.0


def test_a_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians() -> None:
    fast, slow = {0: 10.0, 1: 200.0, 2: 30.0}, {0: 5.0, 1: 50.0, 2: 30.0}
    found = ratio(fast, slow)
    assert found is not None
    assert found.samples == (2.0, 4.0, 1.0)
    assert found.median == 2.0  # the medians, 30 and 30, would say 1


def test_only_repeats_that_both_have_are_compared() -> None:
    found = ratio({0: 10.0, 1: 20.0}, {1: 10.0, 2: 1.0})
    assert found is not None
    assert found.samples == (2.0,)
    assert ratio({0: 10.0}, {1: 10.0}) is None


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        spread([])
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)
    with pytest.raises(ValueError, match="0 to 100"):
        percentile([1.0], 101)
