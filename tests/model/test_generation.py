"""Sampling defaults of a checkpoint: what the file says, OpenAI's where it is silent, refusals by name."""

import json
from pathlib import Path

import pytest

from model.config import ConfigError
from model.generation import GenerationDefaults, read_generation_defaults


def read(directory: Path, **fields: object) -> GenerationDefaults:
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return read_generation_defaults(directory)


def test_absent_file_means_openais_defaults(tmp_path: Path) -> None:
    defaults = GenerationDefaults(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    assert read_generation_defaults(tmp_path) == defaults
    assert read(tmp_path) == defaults
    assert read(tmp_path, temperature=None, top_p=None, top_k=None, repetition_penalty=None) == defaults


def test_v2_chats_values_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, temperature=0.3, top_p=0.95, do_sample=True) == GenerationDefaults(0.3, 0.95)


def test_every_field_is_read(tmp_path: Path) -> None:
    given = {"temperature": 0.5, "top_p": 0.6, "top_k": 7, "repetition_penalty": 1.1}
    assert read(tmp_path, **given) == GenerationDefaults(**given)


def test_do_sample_false_does_not_make_requests_greedy(tmp_path: Path) -> None:
    assert read(tmp_path, do_sample=False).temperature == 1.0


@pytest.mark.parametrize(("temperature", "top_k", "penalty"), [(0, 0, 0.001), (2, 10**6, 10)])
def test_bounds_themselves_are_allowed(tmp_path: Path, temperature: float, top_k: int, penalty: float) -> None:
    defaults = read(tmp_path, temperature=temperature, top_k=top_k, repetition_penalty=penalty)
    assert defaults == GenerationDefaults(temperature, 1.0, top_k, penalty)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", [5]),
        ("repetition_penalty", 0),
        ("repetition_penalty", 11),
    ],
)
def test_value_out_of_range_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {field} is .*; expected a number from"):
        read(tmp_path, **{field: value})


@pytest.mark.parametrize("text", ["", "{", "\xff", "[]", "3"])
def test_file_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"generation_config\.json (cannot be read as JSON|holds a JSON)"):
        read_generation_defaults(tmp_path)
