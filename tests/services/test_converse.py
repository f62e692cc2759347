"""`shoal chat` against the application itself: what it asks, and a conversation that outlives a refusal."""

import io

import pytest

from services.cli import main
from tests.services.conftest import SAID
from tests.services.script import MAX_LENGTH
from tests.services.test_experts_command import Door, door

__all__ = ["door"]


def chat(door: Door, *arguments: str) -> int:
    return main(["chat", *arguments, "--port", str(door.port)])


def test_one_question(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(door, "hi") == 0
    assert capsys.readouterr() == (f"{SAID.strip()}\n", "")
    (asked,) = door.script.asked
    assert asked.params.max_tokens == MAX_LENGTH - len(asked.prompt_ids)  # all that the context leaves
    assert chat(door, "hi", "--max-tokens", "2", "--seed", "7", "--temperature", "0", "--system", "be brief") == 0
    params = door.script.asked[1].params
    assert (params.max_tokens, params.seed, params.temperature) == (2, 7, 0.0)
    assert len(door.script.asked[1].prompt_ids) > len(asked.prompt_ids)


def test_what_is_refused_goes_to_standard_error(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(door, "the " * MAX_LENGTH) == 1
    answer, error = capsys.readouterr()
    assert answer == ""
    assert error.startswith(f"shoal: the context is {MAX_LENGTH} tokens")


def test_a_conversation_goes_on_without_what_was_refused(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n" + "the " * MAX_LENGTH + "\nthe whale\n"))
    assert chat(door) == 0
    answers, error = capsys.readouterr()
    assert answers.count(SAID.strip()) == 2
    assert error.count("the context is") == 1
    first, second = door.script.asked
    decode = door.script.model.tokenizer.decode
    assert decode(second.prompt_ids) == f"{decode(first.prompt_ids)}{SAID}User: the whale\n\nAssistant:"


def test_a_proxy_that_does_not_find_the_service_yet(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    door.absent = True
    assert chat(door, "hi") == 1
    assert "answered 404; it may still be starting" in capsys.readouterr().err
