"""How an answer may end: an error instead of a token, a stop string that the last bytes make, no reason at all."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import FastAPI

from attention.requests import GenerateRequest, Update
from model.chat_template import ChatTemplateError
from model.tokenizer import Tokenizer
from services.openai.text import TextStream
from tests.services.conftest import SAID
from tests.services.script import Script, chat_body, make_app, post

CHAT = "/v1/chat/completions"


class Ending(Script):
    """Ends every answer after two tokens with this update, or with none."""

    last: Update | None = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
        for token in self.answer[:2]:
            yield Update(request.id, (token,))
        if self.last is not None:
            yield self.last


@pytest.fixture
def ending(tokenizer: Tokenizer) -> Ending:
    return Ending(tokenizer, tokenizer.vocab_size, tokenizer.encode(SAID))


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (Update("r", finish_reason="error", error="expert 3 has no host"), "expert 3 has no host"),
        (Update("r", finish_reason="error"), "generation failed"),
        (None, "the answer ended without a reason"),
    ],
)
def test_an_answer_that_fails_is_no_answer(ending: Ending, last: Update | None, said: str) -> None:
    ending.last = last
    app = make_app(ending)
    whole = post(app, CHAT, chat_body())
    assert (whole.status_code, whole.json()["error"]["message"]) == (503, said)
    lines = [line for line in post(app, CHAT, chat_body(stream=True)).text.splitlines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == said
    assert all('finish_reason":"' not in line for line in lines)


DASH = "\N{EM DASH}"
HALF = "\N{REPLACEMENT CHARACTER}"


def cut(script: Script, tokenizer: Tokenizer) -> int:
    """Tokens until just before the dash, which is three of one byte each, is whole."""
    return next(n for n in range(len(script.answer)) if DASH in tokenizer.decode(script.answer[: n + 1]))


@pytest.mark.parametrize(("stop", "reason"), [(f" far {HALF}", "stop"), (f"far {DASH}", "length")])
def test_a_stop_string_may_be_made_by_what_is_left_of_a_character(
    app: FastAPI, script: Script, tokenizer: Tokenizer, stop: str, reason: str
) -> None:
    answer = post(app, CHAT, chat_body(stop=stop, max_tokens=cut(script, tokenizer))).json()["choices"][0]
    assert answer["finish_reason"] == reason
    assert answer["message"]["content"].startswith(" the whale swim")
    assert (HALF in answer["message"]["content"]) == (reason == "length")


def test_what_is_left_at_the_end_is_cut_at_the_first_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["far", " swim"], True, False, 0)
    pieces = [stream.push(token) for token in tokenizer.encode(" the whale swim far")]
    assert "".join(piece.text for piece in pieces) == " the whale"
    assert [piece.stopped for piece in pieces].index(True) == len(tokenizer.encode(" the whale swim")) - 1


def test_messages_that_the_template_refuses_are_the_requests_fault(
    app: FastAPI, script: Script, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> str:
        raise ChatTemplateError("the chat template refused the messages: roles must alternate")

    monkeypatch.setattr(type(tokenizer), "chat_text", refuse)
    answer = post(app, CHAT, chat_body())
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("messages", "invalid_messages")
    assert "roles must alternate" in error["message"]
    assert script.asked == []
