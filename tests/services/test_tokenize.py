"""/tokenize, /detokenize and /v1/models."""

from typing import Any

import pytest
from fastapi import FastAPI

from model.tokenizer import Tokenizer
from tests.services.script import MAX_LENGTH, MODEL, call, post


def test_text_to_tokens_and_back(app: FastAPI, tokenizer: Tokenizer) -> None:
    answer = post(app, "/tokenize", {"prompt": "the fish é", "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode("the fish é")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), MAX_LENGTH)
    assert len(answer["token_strs"]) == answer["count"]
    assert post(app, "/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "the fish é"}


def test_messages_go_through_the_template(app: FastAPI, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = post(app, "/tokenize", {"messages": messages}).json()
    assert answer["tokens"] == tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({"prompt": "a"}, True),
        ({"prompt": "a", "add_special_tokens": False}, False),
        ({"messages": [{"role": "user", "content": "a"}]}, False),
        ({"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}, True),
    ],
)
def test_special_tokens_are_added_as_asked(
    app: FastAPI, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], added: bool
) -> None:
    monkeypatch.setattr(tokenizer, "encode", lambda text, add_special_tokens: [int(add_special_tokens)])
    assert post(app, "/tokenize", fields).json()["tokens"] == [added]


def test_what_cannot_be_converted_is_refused(app: FastAPI) -> None:
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}),
        ("/tokenize", {"prompt": "\ud800"}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "ab"}),
    ):
        answer = post(app, path, body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), (path, body)


def test_the_model_is_listed(app: FastAPI) -> None:
    listed = call(app, "GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == [MODEL]
    assert call(app, "GET", f"/v1/models/{MODEL}").json() == listed["data"][0]
