"""A step's record, and its line in the file."""

import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.training.records import StepRecord
from tests.training.step_records import record

FLOATS = [field.name for field in fields(StepRecord) if field.type is float]
COUNTS = [field.name for field in fields(StepRecord) if field.type is int]

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    floats=st.lists(finite, min_size=len(FLOATS), max_size=len(FLOATS)),
    counts=st.lists(st.integers(1, 2**60), min_size=len(COUNTS), max_size=len(COUNTS)),
    hosts=st.lists(st.text()),
)
def test_record_survives_its_line(floats: list[float], counts: list[int], hosts: list[str]) -> None:
    values = dict(zip(FLOATS + COUNTS, [*floats, *counts], strict=True))
    one = StepRecord(**values, hosts_lost=tuple(hosts))
    line = one.to_json()
    assert "\n" not in line
    assert StepRecord.from_json(line.encode()) == one


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} of a training step is .*expected a finite number"):
        replace(record(1), **{name: value})


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_finite_number_is_refused_in_a_line(text: str) -> None:
    line = record(1, loss=123.5).to_json().replace("123.5", text)
    with pytest.raises(ValueError, match="loss of a training step"):
        StepRecord.from_json(line)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 0),
        ("step", 1.0),
        ("step", True),
        ("tokens", -1),
        ("hosts", "4"),
        ("loss", "1"),
        ("loss", None),
        ("loss", False),
        ("loss", 10**400),
        ("hosts_lost", "e1"),
        ("hosts_lost", (1,)),
    ],
)
def test_value_of_another_kind_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} of a training step is"):
        replace(record(1), **{name: value})


@pytest.mark.parametrize("line", ["", "{}", "[1]", "null", '{"step": 1}', "{", '{"step": 1, "loss": 2', "\ufeff{}"])
def test_line_that_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        StepRecord.from_json(line)


def test_line_with_a_field_more_is_refused() -> None:
    document = json.loads(record(1).to_json())
    with pytest.raises(ValueError, match="is no step's record"):
        StepRecord.from_json(json.dumps(document | {"more": 1}))
