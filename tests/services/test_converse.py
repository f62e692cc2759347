"""`shoal chat` against the application itself: what it asks, and a conversation that outlives a refusal."""

import io
import json

import pytest

from services.cli import main
from services.openai.text import Piece, TextStream
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


@pytest.mark.parametrize(
    "text", ["all:\n\tcc x.c", "a :cat: b", "[red]a[/red] 12", "-" * 300, "a\r\nb", "x" + " " * 200 + "y"]
)
def test_an_answer_is_printed_as_it_is_written(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Though one token may be all of it: a console would expand tabs, draw pictures, and wrap it."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(TextStream, "push", lambda *_: Piece(text, stopped=True))
    assert chat(door, "hi") == 0
    assert capsys.readouterr().out == f"{text}\n"


def test_an_empty_question_is_a_question(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a conversation\n"))
    assert chat(door, "") == 0
    (asked,) = door.script.asked
    assert "conversation" not in door.script.model.tokenizer.decode(asked.prompt_ids)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hi", "--temperature", "nan"], "argument --temperature: nan given; expected a finite number"),
        (["hi", "--temperature", "inf"], "expected a finite number"),
        (["caf\udce9"], "argument message: 'caf\\udce9' given; expected text in UTF-8"),
        (["hi", "--system", "caf\udce9"], "argument --system: 'caf\\udce9' given; expected text in UTF-8"),
    ],
)
def test_what_cannot_be_sent_is_a_wrong_command_line(
    door: Door, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        chat(door, *arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_utf8_ends_a_conversation_with_a_word(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", given)
    assert chat(door) == 1
    assert capsys.readouterr().err.startswith("shoal: a line of standard input cannot be sent, as it is no UTF-8: ")


@pytest.mark.parametrize("said", ["<html></html>", {}, [], {"data": []}])
def test_an_address_of_something_else(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    answer = said if isinstance(said, str) else json.dumps(said)
    monkeypatch.setattr("httpx.Response.text", answer)
    monkeypatch.setattr("httpx.Response.json", lambda response: json.loads(answer))
    assert chat(door, "hi") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"shoal: http://127.0.0.1:{door.port}/v1/models names no model")
