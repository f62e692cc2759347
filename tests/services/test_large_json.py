"""Answers of many log-probabilities are written in parts, none of them long, to the bytes that one call writes."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from hypothesis import given
from hypothesis import strategies as st

from services.openai.chat import _whole, plan_chat
from services.openai.choice import ChoicePiece
from services.openai.large_json import RESPONSE, RUN, LargeResponse, json_parts
from services.openai.schema import ChatRequest
from services.openai.sse import MANY_TOKENS, Event, event, event_of, stream
from services.openai.text import ShownToken
from tests.services.script import MODEL, Script, chat_body, post, score

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=30,
)


@given(value=VALUES)
def test_a_large_response_is_a_json_response(value: Any) -> None:
    large, plain = LargeResponse(value), JSONResponse(value)
    assert (large.body, large.raw_headers) == (plain.body, plain.raw_headers)


@pytest.mark.parametrize("count", [0, 1, RUN - 1, RUN, RUN + 1, 3 * RUN])
@pytest.mark.parametrize("items", [[1, 2.5, "é"], [None, {"a": [1]}], [[], {}]], ids=["plain", "some", "all"])
def test_long_lists_are_written_alike_also_as_iterators(items: list[Any], count: int) -> None:
    whole = (items * count)[:count]

    def once() -> Iterator[Any]:
        yield from whole

    for value in (whole, {"a": [{"b": whole}]}, [[[[[[whole]]]]]]):
        assert LargeResponse(value).body == JSONResponse(value).body
    assert LargeResponse({"a": once()}).body == JSONResponse({"a": whole}).body
    assert event({"a": once()}) == event({"a": whole})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {"a": [{"b": [[float("nan")]]}]}])
def test_what_is_no_json_is_refused_as_by_a_json_response(bad: object) -> None:
    for kind in (JSONResponse, LargeResponse):
        with pytest.raises(ValueError, match="not JSON compliant"):
            kind(bad)


def test_no_part_of_a_large_answer_is_long(script: Script) -> None:
    """So the encoder, which keeps all threads waiting, is never called for much."""
    body = chat_body(model=MODEL, n=3, logprobs=True, top_logprobs=20)
    plan = plan_chat(ChatRequest.model_validate(body), script)
    tokens = tuple(ShownToken(token, 0, score(token, 20)) for token in range(60, 560))
    pieces = [[ChoicePiece(index, "a", tokens, "stop", len(tokens), 0)] for index in range(3)]
    parts = list(json_parts(_whole(plan, script, pieces), RESPONSE))
    assert sum(map(len, parts)) > 500 * max(map(len, parts))
    assert max(map(len, json_parts([[1] * 1000] * 3, RESPONSE))) <= 2 * RUN
    assert [len(choice["logprobs"]["content"]) for choice in json.loads("".join(parts))["choices"]] == [500] * 3


@pytest.mark.parametrize("echo", [False, True])
def test_an_answers_bytes_are_those_of_its_json(app: FastAPI, echo: bool) -> None:
    for path, body in {
        "/v1/completions": {"prompt": [5, 6, 7] * 40, "logprobs": 3, "n": 2, "echo": echo},
        "/v1/chat/completions": chat_body(logprobs=True, top_logprobs=3, n=2),
        "/tokenize": {"prompt": "the — é\u2028whale" * 40, "return_token_strs": True},
    }.items():
        answer = post(app, path, body)
        assert answer.content == JSONResponse(answer.json()).body
        assert answer.headers["content-type"] == "application/json"
        assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("tokens", [0, MANY_TOKENS, MANY_TOKENS + 1, 1000])
def test_an_event_of_many_tokens_is_made_and_written_beside_the_event_loop(tokens: int) -> None:
    data = {"choices": [{"logprobs": {"tokens": ["— \u2028\x85\u2029é"] * tokens, "offsets": list(range(tokens))}}]}
    threads: list[int] = []

    def make() -> dict[str, Any]:
        threads.append(threading.get_ident())
        return data

    async def sent() -> bytes:
        made: Event = await event_of(tokens, make)

        async def events() -> Any:
            yield made

        body = (await stream(events())).body_iterator
        return b"".join([part.encode() if isinstance(part, str) else bytes(part) async for part in body])

    assert asyncio.run(sent()) == (event(data) + "data: [DONE]\n\n").encode()
    assert (threads == [threading.get_ident()]) is (tokens <= MANY_TOKENS)
