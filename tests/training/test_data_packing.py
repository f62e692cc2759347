"""Packing: whole samples, none lost, none doubled, and nothing predicted across samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.training.segments import IGNORED
from services.training.data.packing import first_fit, lay
from services.training.data.samples import Sample

LENGTHS = st.integers(1, 20).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))
)


def sample(ids: list[int], mask: list[bool]) -> Sample:
    return Sample(np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_), 1, 0)


SAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 2047), st.booleans()), min_size=1, max_size=9).map(
        lambda pairs: sample([token for token, _ in pairs], [on for _, on in pairs])
    ),
    min_size=1,
    max_size=8,
)


@given(given=LENGTHS)
def test_each_sample_goes_to_the_first_row_with_room(given: tuple[int, list[int]]) -> None:
    capacity, lengths = given
    expected: list[list[int]] = []
    for index, length in enumerate(lengths):
        for row in expected:
            if sum(lengths[other] for other in row) + length <= capacity:
                row.append(index)
                break
        else:
            expected.append([index])
    assert first_fit(lengths, capacity) == expected


@given(given=LENGTHS)
def test_no_sample_is_lost_doubled_or_too_much_for_its_row(given: tuple[int, list[int]]) -> None:
    capacity, lengths = given
    rows = first_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)


@pytest.mark.parametrize("length", [0, -1, 9])
def test_sample_that_fits_no_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 8"):
        first_fit([4, length], 8)


def test_a_row_by_hand() -> None:
    row = lay([sample([5, 6, 7], [False, True, True]), sample([8], [True]), sample([9, 3], [True, False])], [4, 0, 2])
    assert row.token_T.tolist() == [5, 6, 7, 8, 9, 3]
    assert row.target_T.tolist() == [6, 7, IGNORED, IGNORED, IGNORED, IGNORED]
    assert row.position_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert row.segment_ends == (3, 4, 6)
    assert row.samples == (4, 0, 2)
    assert row.targets == 2
    assert {array.dtype for array in (row.token_T, row.target_T, row.position_T)} == {np.dtype(np.int64)}


@given(samples=SAMPLES)
def test_targets_stay_within_their_segment(samples: list[Sample]) -> None:
    row = lay(samples, range(len(samples)))
    assert len(row.token_T) == len(row.target_T) == len(row.position_T) == row.segment_ends[-1]
    begins = [0, *row.segment_ends][: len(samples)]
    for begin, end, one in zip(begins, row.segment_ends, samples, strict=False):
        assert row.token_T[begin:end].tolist() == one.ids.tolist()
        assert row.position_T[begin:end].tolist() == list(range(len(one.ids)))
        for place in range(len(one.ids)):
            follows = place + 1 < len(one.ids) and bool(one.mask[place + 1])
            assert row.target_T[begin + place] == (one.ids[place + 1] if follows else IGNORED)
    assert row.targets == sum(one.targets for one in samples)
    assert len(row.segment_ends) == len(samples)
