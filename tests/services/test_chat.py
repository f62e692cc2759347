"""/v1/chat/completions, whole and streamed, as the openai client sees it."""

import asyncio
import json
import threading
from typing import Any

import pytest
from fastapi import FastAPI

from model.chat_template import ChatTemplate
from model.tokenizer import Tokenizer
from services.openai.sse import MANY_TOKENS
from tests.services.conftest import SAID
from tests.services.script import MODEL, Script, chat_body, openai_client, post
from tests.words import EOS

MESSAGES: Any = [{"role": "user", "content": "hi"}]


def ask(app: FastAPI, **fields: Any) -> Any:
    async def send() -> Any:
        async with openai_client(app) as client:
            return await client.chat.completions.create(model=MODEL, messages=MESSAGES, **fields)

    return asyncio.run(send())


def listen(app: FastAPI, **fields: Any) -> list[Any]:
    async def send() -> list[Any]:
        async with openai_client(app) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **fields)
            return [chunk async for chunk in stream]

    return asyncio.run(send())


def test_a_whole_answer(app: FastAPI, script: Script, tokenizer: Tokenizer) -> None:
    answer = ask(app, max_tokens=100, seed=9)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", SAID, "stop")
    assert answer.usage.completion_tokens == len(script.answer)
    assert answer.usage.prompt_tokens == len(tokenizer.apply_chat_template(MESSAGES))
    assert script.asked[0].prompt_ids == tuple(tokenizer.apply_chat_template(MESSAGES))
    assert script.asked[0].params.seed == 9


def test_a_stream_is_the_same_answer_in_whole_characters(app: FastAPI) -> None:
    chunks = listen(app, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == SAID
    assert all("\N{REPLACEMENT CHARACTER}" not in (delta.content or "") for delta in deltas)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", chat_body()), ("/v1/completions", {"prompt": "a", "echo": True})]
)
def test_usage_is_null_until_it_is_told(app: FastAPI, path: str, body: dict[str, Any]) -> None:
    """As OpenAI's reference has it of streams whose last chunk tells it."""
    answer = post(app, path, body | {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, last, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert done == "[DONE]"
    assert [json.loads(chunk)["usage"] for chunk in chunks] == [None] * len(chunks)
    assert json.loads(last)["usage"]["prompt_tokens"] > 0
    assert "usage" not in post(app, path, body | {"stream": True}).text


def test_without_stream_options_there_is_no_usage(app: FastAPI) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in listen(app))


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_bound_the_answer(app: FastAPI, field: str, script: Script) -> None:
    answer = ask(app, **{field: 3})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)
    assert script.asked[0].params.max_tokens == 3


def test_n_choices_have_seeds_of_their_own(app: FastAPI, script: Script) -> None:
    answer = ask(app, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    seeds = [request.params.seed for request in script.asked]
    assert len(set(seeds)) == 3
    script.asked.clear()
    ask(app, n=3, seed=5)
    assert [request.params.seed for request in script.asked] == seeds
    assert answer.usage.completion_tokens == 3 * len(script.answer)


def test_n_choices_stream_side_by_side(app: FastAPI) -> None:
    texts = ["", ""]
    for chunk in listen(app, n=2):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [SAID, SAID]


@pytest.mark.parametrize("stop", ["swim", "ale s", " ", ["zzz", "far"], "— ok", "hale swim far —"])
def test_a_stop_string_ends_the_answer_and_is_not_shown(app: FastAPI, script: Script, stop: Any) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    expected = min((SAID.split(word)[0] for word in stops), key=len)
    answer = ask(app, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    streamed = listen(app, stop=stop)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
    assert streamed[-1].choices[0].finish_reason == "stop"
    assert len(script.cancelled) == 2


@pytest.mark.parametrize(
    ("min_tokens", "stop", "shown"),
    [
        (2, " swim", " the whale"),
        (3, " swim", SAID),
        (1, "whale swim", " the "),
        (2, "whale swim", SAID),
        (3, ["the", " far", " swim"], " the whale swim"),
        (8, "ok", SAID.removesuffix("ok")),
        (9, "ok", SAID),
    ],
)
def test_min_tokens_holds_off_stop_strings(
    app: FastAPI, script: Script, min_tokens: int, stop: str | list[str], shown: str
) -> None:
    """Text of the first so many tokens ends nothing, neither alone nor with what follows it."""
    fields: Any = {"stop": stop, "max_tokens": 20, "extra_body": {"min_tokens": min_tokens}}
    assert len(script.answer) == 10
    answer = ask(app, **fields)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (shown, "stop")
    assert answer.usage.completion_tokens >= min_tokens
    assert "".join(chunk.choices[0].delta.content or "" for chunk in listen(app, **fields)) == shown


@pytest.mark.parametrize("end", [" fish", EOS])
@pytest.mark.parametrize("include", [False, True])
def test_the_token_that_ends_the_answer_is_shown_only_when_asked_for_but_counts(
    app: FastAPI, script: Script, tokenizer: Tokenizer, end: str, include: bool
) -> None:
    """As vLLM has it, and also where a checkpoint's end token is not special to its tokenizer."""
    script.end = tuple(tokenizer.encode(end))
    shown = SAID + end * include
    fields: Any = {
        "logprobs": True,
        "stop": [f"ok{end} and more"],
        "extra_body": {"skip_special_tokens": False, "include_stop_str_in_output": include},
    }
    answer = ask(app, **fields)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (shown, "stop")
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content) == len(script.answer) + 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in listen(app, **fields)) == shown


def test_what_only_begins_like_a_stop_string_is_shown(app: FastAPI) -> None:
    assert ask(app, stop="ok then").choices[0].message.content == SAID


def test_logprobs_name_every_token(app: FastAPI, script: Script) -> None:
    content = ask(app, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx([-token / 100 for token in script.answer])
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == SAID
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    streamed = [chunk.choices[0].logprobs for chunk in listen(app, logprobs=True)]
    assert sum(len(part.content) for part in streamed if part) == len(script.answer)


def test_many_tokens_without_text_are_told_at_the_end(
    app: FastAPI, script: Script, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once: they are written beside the event loop."""
    text_of, threads = tokenizer.token_text, set[int]()

    def watched(token: int) -> str:
        threads.add(threading.get_ident())
        return text_of(token)

    monkeypatch.setattr(tokenizer, "token_text", watched)
    script.answer = [0] * 40
    assert len(script.answer) > MANY_TOKENS
    whole = ask(app, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    streamed = [chunk.choices[0].logprobs for chunk in listen(app, logprobs=True, top_logprobs=1)]
    assert [len(part.content) for part in streamed if part] == [40]
    assert next(part.content for part in streamed if part) == whole
    assert threads
    assert threading.get_ident() not in threads


def test_sampling_fields_reach_the_engine_and_defaults_are_the_checkpoints(app: FastAPI, script: Script) -> None:
    post(app, "/v1/chat/completions", chat_body())
    post(
        app,
        "/v1/chat/completions",
        chat_body(
            temperature=0,
            top_p=0.5,
            top_k=7,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.2,
            logit_bias={"5": -100, "6": 1.5},
            ignore_eos=True,
            stop_token_ids=[9],
            min_tokens=2,
        ),
    )
    default, given = (request.params for request in script.asked)
    assert (default.temperature, default.top_p, default.ignore_eos) == (0.7, 0.9, False)
    assert (given.temperature, given.top_p, given.top_k, given.min_p) == (0, 0.5, 7, 0.1)
    assert (given.presence_penalty, given.frequency_penalty, given.repetition_penalty) == (1, -1, 1.2)
    assert (given.logit_bias, given.ignore_eos) == (((5, -100.0), (6, 1.5)), True)
    assert (given.stop_token_ids, given.min_tokens) == ((9,), 2)


def test_content_may_come_in_parts_and_roles_may_be_new(app: FastAPI, script: Script, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    assert post(app, "/v1/chat/completions", {"messages": messages}).status_code == 200
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert script.asked[0].prompt_ids == tuple(tokenizer.apply_chat_template(plain))


def test_names_are_for_the_template(app: FastAPI, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_template", ChatTemplate("{% for m in messages %}{{ m.name }}: {% endfor %}", {}))
    messages = [{"role": "user", "content": "hi", "name": "Ahab"}]
    assert post(app, "/tokenize", {"messages": messages}).json()["tokens"] == tokenizer.encode("Ahab: ", False)


def test_messages_may_say_that_they_are_text(app: FastAPI, script: Script, tokenizer: Tokenizer) -> None:
    """As lm-eval's do."""
    messages = [{"role": "user", "content": "hi", "type": "text"}]
    assert post(app, "/v1/chat/completions", {"messages": messages}).status_code == 200
    assert script.asked[0].prompt_ids == tuple(tokenizer.apply_chat_template(MESSAGES))


HINTS: list[dict[str, Any]] = [
    {"prompt_cache_retention": "in_memory"},
    {"prompt_cache_retention": "24h"},
    {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
    {"modalities": ["text"]},
    {"verbosity": "medium"},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "high"},
    {"tool_choice": "auto"},
    {"stream_options": {"include_obfuscation": False}},
]
NULLS = [
    *("prompt_cache_retention", "prompt_cache_options", "modalities", "verbosity", "reasoning_effort", "prediction"),
    *("audio", "moderation", "web_search_options", "tools", "functions", "response_format", "tool_choice"),
]


@pytest.mark.parametrize("hint", [*HINTS, dict.fromkeys(NULLS)], ids=str)
def test_a_hint_changes_nothing(app: FastAPI, script: Script, hint: dict[str, Any]) -> None:
    for body in (chat_body(seed=3, stream=True), chat_body(seed=3, stream=True, **hint)):
        answer = post(app, "/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
    plain, hinted = script.asked
    assert (plain.prompt_ids, plain.params) == (hinted.prompt_ids, hinted.params)


def test_json_is_asked_for_by_a_schema_whose_keys_keep_their_order(app: FastAPI, script: Script) -> None:
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in "zam"}}
    named = {"name": "letters", "description": "three of them", "strict": True, "schema": schema}
    ask(app, response_format={"type": "json_schema", "json_schema": named})
    ask(app, response_format={"type": "json_object"})
    ask(app, response_format={"type": "text"})
    body = {"prompt": "a", "response_format": {"type": "json_object"}}
    assert post(app, "/v1/completions", body).status_code == 200
    given, *rest = (request.params.json_schema for request in script.asked)
    assert given == json.dumps(schema)
    assert rest == ['{"type": "object"}', None, '{"type": "object"}']


def test_a_stream_option_may_be_null(app: FastAPI) -> None:
    options = dict.fromkeys(("include_usage", "include_obfuscation"))
    assert post(app, "/v1/chat/completions", chat_body(stream=True, stream_options=options)).status_code == 200


def test_seeds_below_zero_are_seeds_of_their_own(app: FastAPI, script: Script) -> None:
    for seed in (-1, 1, -(2**63), -1):
        assert ask(app, seed=seed).choices[0].message.content == SAID
    first, *_, again = seeds = [request.params.seed for request in script.asked]
    assert first == again
    assert len(set(seeds)) == 3


def test_cached_tokens_are_told(app: FastAPI, script: Script) -> None:
    script.cached = 16
    assert ask(app).usage.prompt_tokens_details.cached_tokens == 16


def test_an_answer_may_be_sent_back_as_it_came(app: FastAPI, script: Script) -> None:
    """By OpenAI's client, which sends each field that the answer had; and with those that the client added."""

    async def converse() -> None:
        async with openai_client(app) as client:
            first = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
            said: Any = first.choices[0].message
            for message in (said, said.model_dump()):
                following: Any = [*MESSAGES, message, {"role": "user", "content": "the whale"}]
                await client.chat.completions.create(model=MODEL, messages=following)

    asyncio.run(converse())
    assert len({request.prompt_ids for request in script.asked[1:]}) == 1
    assert len(script.asked[1].prompt_ids) > len(script.asked[0].prompt_ids)
