"""Whatever is sent, the answer has OpenAI's shape, says what to do, and harms nobody else."""

import asyncio
import gzip
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError

from model.tokenizer import Tokenizer
from services.openai.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.services.conftest import SAID
from tests.services.script import MAX_LENGTH, MODEL, Script, call, chat_body, make_app, post

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


SCHEMA = {"json_schema": {"name": "a", "schema": {}}}


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", **fields}}}


def assert_error(answer: httpx.Response, status: int, said: str, param: str | None = None) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.status_code == status, error
    assert said in error["message"], error
    if param is not None:
        assert error["param"] is not None
        assert error["param"].startswith(param)
    return error


@pytest.mark.parametrize(
    ("fields", "said", "param"),
    [
        ({"n": 10_000}, "less than or equal to 128; given 10000", "n"),
        ({"n": 0}, "greater than or equal to 1", "n"),
        ({"max_tokens": -1}, "given -1", "max_tokens"),
        ({"max_tokens": 0}, "at least 1", None),
        ({"max_tokens": 2.5}, "given 2.5", "max_tokens"),
        ({"max_tokens": "5"}, "given '5'", "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ", None),
        ({"max_tokens": 5000}, f"the context is {MAX_LENGTH} tokens", "max_tokens"),
        ({"max_completion_tokens": 5000}, f"the context is {MAX_LENGTH} tokens", "max_completion_tokens"),
        ({"temperature": 3}, "less than or equal to 2", "temperature"),
        ({"temperature": True}, "given True", "temperature"),
        ({"top_p": 0}, "greater than 0", "top_p"),
        ({"top_logprobs": 21, "logprobs": True}, "20", "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs", None),
        ({"seed": -(2**63) - 1}, "given -9223372036854775809", "seed"),
        ({"seed": 2**63}, "given 9223372036854775808", "seed"),
        ({"stop": ["a"] * 17}, "16", "stop"),
        ({"stop": ""}, "at least 1 character", "stop"),
        ({"logit_bias": {"x": 1}}, "expected an id below", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "expected an id below", "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "expected an id below", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "100", "logit_bias"),
        ({"logit_bias": {"05": 1}}, "expected an id below", "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "expected an id below", "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "1024", "logit_bias"),
        ({"logit_bias": 5}, "valid dictionary", "logit_bias"),
        ({"logit_bias": [[5, 1]]}, "valid dictionary", "logit_bias"),
        ({"messages": []}, "at least 1 item", "messages"),
        ({"messages": "hi"}, "valid list", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "'assistant'", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "required", "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, f"the context is {MAX_LENGTH} tokens", "messages"),
        ({"messages": [{"role": "user", "content": "the " * 200}]}, f"the context is {MAX_LENGTH} tokens", "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "", None),
        ({"model": "gpt-9"}, f"'gpt-9' is not served here; ask for '{MODEL}'", "model"),
        ({"model": 5}, "valid string", "model"),
        ({"wibble": 1}, "unknown parameter 'wibble'", "wibble"),
        ({"x-wibble": 1}, "unknown parameter 'x-wibble'", "x-wibble"),
        ({"messages": [{"role": "user", "content": "x", "x-y": 1}]}, "unknown parameter 'messages.0.x-y'", "messages"),
        ({"messages": [{"role": "user", "content": "x", "type": "image"}]}, "'text'", "messages.0.type"),
        ({"modalities": []}, "at least 1 item", "modalities"),
        ({"reasoning_effort": "huge"}, "given 'huge'", "reasoning_effort"),
        ({"verbosity": 3}, "given 3", "verbosity"),
        ({"stream_options": {"include_usage": True}}, "set stream to true", None),
        ({"response_format": {"type": "poem"}}, "'text'", "response_format"),
        ({"response_format": "text"}, "valid dictionary", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "send both, or neither", "response_format"),
        ({"response_format": {"type": "text"} | SCHEMA}, "send both, or neither", "response_format"),
        (json_schema(), "required", "response_format.json_schema.schema"),
        (json_schema(schema=5), "valid dictionary", "response_format.json_schema.schema"),
        (json_schema(schema={}, kind="x"), "unknown parameter 'response_format.json_schema.kind'", "response_format"),
        (json_schema(schema={"type": "bogus"}), "response_format's schema: Invalid type: bogus", "response_format"),
        (json_schema(schema={"type": "string", "pattern": "(?<=a)b"}), "look-around", "response_format"),
        (json_schema(schema={"enum": ["x" * 66_000]}), "expected at most 65536", "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos is True; expected it lef", None),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens is 3; expected it left out", None),
        ({"stop_token_ids": [10**8]}, "outside the vocabulary", "stop_token_ids"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", None),
    ],
)
def test_a_bad_chat_is_refused_by_name(app: FastAPI, fields: dict[str, Any], said: str, param: str | None) -> None:
    body = json.dumps({"model": MODEL} | chat_body(**fields))
    answer = call(app, "POST", CHAT, content=body, headers={"content-type": "application/json"})
    status = 404 if fields.get("model") == "gpt-9" else 400
    assert assert_error(answer, status, said, param)["type"] in ("invalid_request_error", "not_found_error")
    assert post(app, CHAT, chat_body()).json()["choices"][0]["message"]["content"] == SAID


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": []}, "at least 1 item"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [[]]}, "at least 1 item"),
        ({"prompt": ["a"] * 65}, "64"),
        ({"prompt": [5, -1]}, "greater than or equal to 0"),
        ({"prompt": [5, 100_000]}, "token id 100000 is outside the vocabulary"),
        ({"prompt": [5, 1 << 40]}, "given"),
        ({"prompt": [5, "a"]}, ""),
        ({"prompt": [True]}, ""),
        ({"prompt": {"a": 1}}, ""),
        ({"prompt": None}, ""),
        ({"prompt": [5] * 500}, "the prompt has 500"),
        ({"prompt": "a", "max_tokens": 0}, "echo"),
        ({"prompt": "a", "logprobs": 21}, "20"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, ""),
        ({}, "required"),
    ],
)
def test_a_bad_completion_is_refused_by_name(app: FastAPI, fields: dict[str, Any], said: str) -> None:
    assert_error(post(app, TEXT, fields), 400, said)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": TOOL}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": CALLS}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": CALLS}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"audio": {"voice": "ash", "format": "wav"}}, "audio"),
        ({"verbosity": "low"}, "verbosity"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
)
def test_what_openai_has_and_this_service_lacks_is_said(app: FastAPI, fields: dict[str, Any], param: str) -> None:
    error = assert_error(post(app, CHAT, chat_body(**fields)), 400, "is not supported", param)
    assert (error["code"], error["type"]) == ("unsupported_parameter", "invalid_request_error")
    assert error["message"].startswith(param)


def test_a_suffix_is_said_not_to_be_supported(app: FastAPI) -> None:
    error = assert_error(post(app, TEXT, {"prompt": "a", "suffix": "b"}), 400, "suffix is not supported", "suffix")
    assert error["code"] == "unsupported_parameter"
    assert post(app, TEXT, {"prompt": "a", "suffix": ""}).status_code == 200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"", ""),
        (b"[1, 2]", ""),
        (b'"text"', ""),
        (b"null", ""),
        (b'{"model": "\xff\xfe"}', "not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (gzip.compress(b"{}", mtime=0), "send UTF-8, not compressed"),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', ""),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "a"}], "temperature": Infinity}', ""),
        (b"[" * 50_000 + b"]" * 50_000, "not valid JSON: maximum recursion depth"),
        (b'{"a":' * 25_000 + b"1" + b"}" * 25_000, "not valid JSON: maximum recursion depth"),
        (b'{"model": "scripted", "max_tokens": 1' + b"0" * 5000 + b"}", ""),
    ],
    ids=[
        "cut",
        "empty",
        "list",
        "string",
        "null",
        "utf-8",
        "gzip",
        "nan",
        "infinity",
        "deep list",
        "deep",
        "long number",
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_a_body_that_is_no_request(app: FastAPI, path: str, content: bytes, said: str) -> None:
    answer = call(app, "POST", path, content=content, headers={"content-type": "application/json"})
    assert_error(answer, 400, said)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_does_not_say_it_is_json_is_told_how(app: FastAPI, kind: str | None) -> None:
    content = json.dumps({"model": MODEL} | chat_body())
    answer = call(app, "POST", CHAT, content=content, headers={"content-type": kind} if kind else {})
    assert_error(answer, 415, "Content-Type: application/json")


@pytest.mark.parametrize("prompt", [[1.5] * 5000, [[1.5] * 2000] * 64, [None] * 5000, [["a"]] * 64])
def test_a_long_wrong_prompt_is_not_faulted_item_by_item(app: FastAPI, prompt: list[object]) -> None:
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"model": MODEL, "prompt": prompt})
    assert refused.value.error_count() < 10
    assert len(assert_error(post(app, TEXT, {"prompt": prompt}), 400, "prompt")["message"]) < 300


PARTS = [{"role": "user", "content": [{}] * 300}] * 100
KEYS = {f"x{n}": 1 for n in range(5000)}
SAYS = {"role": "user", "content": "hi"}
FAULTS: list[tuple[type[BaseModel], dict[str, Any], int, str]] = [
    (ChatRequest, {"messages": PARTS}, 3, "messages.0.content.0.type"),
    (ChatRequest, {"messages": [{}] * 4096}, 2, "messages.0.role"),
    (ChatRequest, {"messages": [SAYS, *[5] * 1000]}, 1, "messages.1"),
    (ChatRequest, {"messages": [SAYS]} | KEYS, 1, "'x0'"),
    (ChatRequest, {"messages": [SAYS | KEYS] * 9}, 1, "'messages.0.x0'"),
    (ChatRequest, {"messages": [SAYS | {"content": [{"type": "text", "text": "a"} | KEYS] * 9}]}, 2, "0.x0'"),
    (ChatRequest, {"messages": [SAYS], "stream": True, "stream_options": KEYS}, 1, "'stream_options.x0'"),
    (ChatRequest, {"messages": [SAYS], "response_format": {"type": "text"} | KEYS}, 1, "'response_format.x0'"),
    (ChatRequest, {"messages": [SAYS], "prompt_cache_options": KEYS}, 1, "'prompt_cache_options.x0'"),
    (ChatRequest, {"messages": [SAYS], "logit_bias": {str(n): "x" for n in range(5000)}}, 1, "1024 items"),
    (ChatRequest, {"messages": [SAYS], "stop": [""] * 5000}, 2, "stop.0"),
    (ChatRequest, {"messages": [SAYS], "stop_token_ids": [-1] * 5000}, 1, "stop_token_ids.0"),
    (CompletionRequest, {"prompt": [""] * 5000, "stop": [5] * 5000}, 9, "stop"),
    (CompletionRequest, {"prompt": [[]] * 5000}, 9, "prompt"),
    (TokenizeRequest, {"messages": PARTS}, 3, "messages.0.content.0.type"),
    (TokenizeRequest, {"prompt": "a"} | KEYS, 1, "'x0'"),
    (DetokenizeRequest, {"tokens": [-1] * 5000}, 1, "tokens.0"),
    (DetokenizeRequest, {"tokens": [1]} | KEYS, 1, "'x0'"),
]


@pytest.mark.parametrize(("kind", "fields", "most", "named"), FAULTS, ids=[named for _, _, _, named in FAULTS])
def test_one_fault_of_thousands_is_looked_into(
    app: FastAPI, kind: type[BaseModel], fields: dict[str, Any], most: int, named: str
) -> None:
    """Each is an error of its own, made on the event loop: seconds, and gigabytes, for some hundred thousand."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate({"model": MODEL} | fields)
    assert refused.value.error_count() <= most
    path = {ChatRequest: CHAT, CompletionRequest: TEXT, TokenizeRequest: "/tokenize"}.get(kind, "/detokenize")
    assert_error(post(app, path, fields), 400, named)


def test_of_many_keys_the_first_unknown_one_is_named_and_known_ones_are_looked_at(app: FastAPI) -> None:
    body = chat_body(**{f"x{n}": 1 for n in range(1000, 0, -1)})
    error = assert_error(post(app, CHAT, body), 400, "unknown parameter 'x1000'", "x1000")
    assert error["code"] == "unknown_parameter"
    assert_error(post(app, CHAT, body | {"temperature": 3}), 400, "temperature: Input should be less", "temperature")
    assert_error(post(app, CHAT, body | {"tools": [TOOL]}), 400, "tools is not supported", "tools")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chat_body(messages=[SAYS | {"content": "x" * 100_000}]), "messages"),
        (TEXT, {"prompt": ["a", "x" * 100_000]}, "prompt"),
    ],
)
def test_text_that_cannot_fit_is_refused_without_being_tokenised(
    app: FastAPI, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    encode = tokenizer.encode

    def short(text: str, add_special_tokens: bool = True) -> list[int]:
        assert len(text) < 100_000
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", short)
    error = assert_error(post(app, path, body), 400, f"the context is {MAX_LENGTH} tokens", param)
    assert error["code"] == "context_length_exceeded"
    assert "or more: shorten it" in error["message"]


def test_text_that_fits_to_the_last_token_is_answered(app: FastAPI, tokenizer: Tokenizer) -> None:
    longest = max((tokenizer.token_text(token) for token in range(tokenizer.vocab_size)), key=len)
    text = longest * MAX_LENGTH
    assert tokenizer.least_tokens(text) == len(tokenizer.encode(text)) == MAX_LENGTH
    assert post(app, TEXT, {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 0}).status_code == 200
    assert_error(
        post(app, TEXT, {"prompt": text + "a", "echo": True, "max_tokens": 0, "logprobs": 0}), 400, "the context is"
    )


def test_more_answers_than_there_is_room_for_are_refused_before_a_prompt_is_tokenised(
    app: FastAPI, script: Script, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.most_in_flight = 5
    monkeypatch.setattr(tokenizer, "encode", None)
    assert_error(post(app, TEXT, {"prompt": ["a"] * 6}), 400, "6 answers are asked for", "n")


@pytest.mark.parametrize("name", ["n" * 1025, "n" * 100_000])
@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})])
def test_a_long_name_is_not_repeated_whole(app: FastAPI, path: str, body: dict[str, Any], name: str) -> None:
    answer = post(app, path, body | {"model": name})
    assert len(assert_error(answer, 400, "at most 1024 characters", "model")["message"]) < 300
    answer = post(app, CHAT, chat_body(logit_bias={name: 1}))
    assert len(assert_error(answer, 400, "expected an id below", "logit_bias")["message"]) < 300


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_more_answers_than_there_is_ever_room_for_are_not_told_to_come_again(
    app: FastAPI, script: Script, path: str
) -> None:
    script.most_in_flight = 5
    body = chat_body() if path == CHAT else {"prompt": ["a"]}
    assert_error(post(app, path, body | {"n": 6}), 400, "this service computes 5", "n")
    if path == TEXT:
        assert_error(post(app, path, {"prompt": ["a", "b"], "n": 3}), 400, "6 answers are asked for", "n")
    assert post(app, path, body | {"n": 5}).status_code == 200


def test_a_body_over_the_cap_is_not_read(app: FastAPI) -> None:
    answer = call(app, "POST", CHAT, content=b" " * (17 << 20), headers={"content-type": "application/json"})
    assert_error(answer, 413, "over 16777216 bytes")


def test_routes_and_methods_that_are_not_there(app: FastAPI) -> None:
    assert_error(call(app, "GET", "/v1/nothing"), 404, "/v1/nothing does not exist")
    assert_error(call(app, "GET", CHAT), 405, "does not answer GET")
    assert_error(call(app, "GET", "/v1/models/other"), 404, "'other' is not served")


def test_keys_open_and_close_the_doors(script: Script) -> None:
    app = make_app(script, api_key="the-right-key", admin_token="the-admin-token")

    def get(path: str, key: str | None) -> httpx.Response:
        return call(app, "GET", path, headers={b"Authorization": f"Bearer {key}".encode()} if key else {})

    for wrong in (None, "the-wrong-key", "the-admin-token", "ключ"):
        assert_error(get("/v1/models", wrong), 401, "Authorization: Bearer")
    assert get("/v1/models", "the-right-key").status_code == 200
    assert get("/health", None).status_code == 200
    assert_error(get("/admin/status", "the-right-key"), 401, "Bearer")
    assert get("/admin/status", "the-admin-token").json() == {"epoch": 4}


def test_admin_routes_are_closed_without_a_token(app: FastAPI) -> None:
    assert_error(call(app, "GET", "/admin/status"), 403, "no admin token is set")


def test_bad_requests_do_not_disturb_one_that_runs(app: FastAPI, script: Script) -> None:
    script.pause_s = 0.02

    async def both() -> tuple[httpx.Response, list[httpx.Response]]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as client:
            good = asyncio.create_task(client.post(CHAT, json={"model": MODEL} | chat_body()))
            await asyncio.sleep(0.03)
            json_ = {"content-type": "application/json"}
            bad = [await client.post(CHAT, content=b"\xff{" * n, headers=json_) for n in range(1, 6)]
            return await good, bad

    good, bad = asyncio.run(both())
    assert good.json()["choices"][0]["message"]["content"] == SAID
    assert all(answer.status_code == 400 for answer in bad)
