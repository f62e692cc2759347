"""The caps on what a body is made of: JSON of many values keeps the event loop waiting, however few bytes they are."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from services.guards import LONG_NUMBER, MAX_COMMAS, MAX_SIGNS, BodyCap, JsonCount
from tests.services.script import MODEL, Script, call, chat_body

CHAT = "/v1/chat/completions"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet='a"\\,[é\n🐟:'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='b"\\{'), inner, max_size=4),
    max_leaves=20,
)


def send(app: FastAPI, text: str, part_bytes: int = 65536) -> httpx.Response:
    raw = text.encode()

    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(raw), part_bytes):
            yield raw[at : at + part_bytes]

    return call(app, "POST", CHAT, content=parts(), headers={"content-type": "application/json"})


def counted(text: str) -> tuple[int, int]:
    """Commas and signs outside of strings, one character after another."""
    outside = ""
    within = escaped = False
    for char in text:
        if within:
            within = escaped or char != '"'
            escaped = not escaped and char == "\\"
        elif char == '"':
            within = True
        else:
            outside += char
    return outside.count(","), sum(char not in ",0123456789- \t\r\n" for char in outside)


@given(value=VALUES, plain=st.booleans(), indent=st.none() | st.integers(0, 2), data=st.data())
def test_strings_count_for_nothing_wherever_the_text_is_cut(
    value: Any, plain: bool, indent: int | None, data: st.DataObject
) -> None:
    text = json.dumps(value, ensure_ascii=plain, indent=indent)
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    count = JsonCount()
    for begin, end in pairwise([0, *cuts, len(raw)]):
        count.add(raw[begin:end])
    assert (count.commas, count.signs) == counted(text)


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_long_numbers_count_by_their_digits_and_others_do_not(cut: int) -> None:
    count = JsonCount()
    raw = ("[" + ",".join(["1" * (LONG_NUMBER - 1)] * 50) + "]").encode()
    for at in range(0, len(raw), len(raw) // cut + 1):
        count.add(raw[at : at + len(raw) // cut + 1])
    assert (count.commas, count.signs) == (49, 2)
    count.add(b"1" * 10 * LONG_NUMBER)
    assert count.signs > 8 * LONG_NUMBER


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" + "1," * (MAX_COMMAS + 1), f"over {MAX_COMMAS} commas"),
        ("[" + "[]," * (MAX_SIGNS // 2), f"over {MAX_SIGNS} brackets"),
        ("{" + '"a":1,' * (MAX_SIGNS + 1), f"over {MAX_SIGNS} brackets"),
        ("[" + "1.5," * (MAX_SIGNS + 1), f"over {MAX_SIGNS} brackets"),
        ("[" + ("1" * 4000 + ",") * 40, f"over {MAX_SIGNS} brackets"),
    ],
    ids=["numbers", "lists", "keys", "fractions", "digits"],
)
def test_a_body_of_too_many_values_is_not_read_to_its_end(app: FastAPI, script: Script, text: str, said: str) -> None:
    answer = send(app, text + " " * (1 << 20) + "this is no JSON")
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert said in answer.json()["error"]["message"]
    assert "send less at once" in answer.json()["error"]["message"]
    assert script.asked == []


@pytest.mark.parametrize("more", [False, True])
def test_a_body_is_counted_whether_it_comes_whole_or_not(more: bool) -> None:
    body = b"[" * (MAX_SIGNS + 1)
    sent: list[Message] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise AssertionError("it was given the body")

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(BodyCap(application)({"type": "http"}, receive, send))
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("part_bytes", [1000, 65536, 1 << 24])
def test_text_may_hold_any_number_of_signs(app: FastAPI, script: Script, part_bytes: int) -> None:
    said = '[{"a":1.5,\\' * 40_000
    body = json.dumps({"model": MODEL} | chat_body(user=said))
    assert send(app, body, part_bytes).status_code == 200
    assert len(script.asked) == 1


def test_what_the_schema_has_room_for_is_read(app: FastAPI) -> None:
    """As many messages as there may be, and as many token ids: they are answered by the routes."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}] * 4096
    answer = send(app, json.dumps({"model": MODEL, "messages": messages}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    body = json.dumps({"model": MODEL, "prompt": [5] * (1 << 20)})
    answer = call(app, "POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
