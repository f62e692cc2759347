"""/v1/completions: every form of prompt, echo and log-probabilities."""

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from model.tokenizer import Tokenizer
from services.openai.sse import MANY_TOKENS
from tests.services.conftest import SAID
from tests.services.script import MODEL, Script, chat_body, openai_client, post
from tests.words import BOS, EOS


def ask(app: FastAPI, **fields: Any) -> Any:
    async def send() -> Any:
        async with openai_client(app) as client:
            return await client.completions.create(**({"model": MODEL, "max_tokens": 100} | fields))

    return asyncio.run(send())


def stream(app: FastAPI, **fields: Any) -> list[dict[str, Any]]:
    answer = post(app, "/v1/completions", {"max_tokens": 100, "stream": True} | fields)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(
    "prompt",
    ["the fish", [5, 6, 7], ["the fish", "a ray"], [[5, 6], [7]]],
    ids=["text", "tokens", "texts", "token lists"],
)
def test_every_form_of_prompt(app: FastAPI, script: Script, tokenizer: Tokenizer, prompt: Any) -> None:
    answer = ask(app, prompt=prompt)
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    expected = [tuple(tokenizer.encode(one) if isinstance(one, str) else one) for one in several]
    assert [request.prompt_ids for request in script.asked] == expected
    assert [choice.text for choice in answer.choices] == [SAID] * len(expected)
    assert answer.usage.prompt_tokens == sum(map(len, expected))


def test_n_multiplies_the_prompts(app: FastAPI, script: Script) -> None:
    answer = ask(app, prompt=["a", "the"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert script.asked[0].prompt_ids == script.asked[1].prompt_ids != script.asked[2].prompt_ids
    assert len({request.params.seed for request in script.asked}) == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_null_asks_for_nothing(app: FastAPI, script: Script, path: str, stream: bool) -> None:
    """And is answered as if it were left out."""
    nulls = ("n", "max_tokens", "min_tokens", "stop", "stop_token_ids", "logit_bias", "top_p", "top_k", "min_p", "seed")
    nulls += ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "stream_options")
    body: dict[str, Any] = {"prompt": "a"} if path == "/v1/completions" else chat_body()
    for given in (body, body | dict.fromkeys(nulls)):
        assert post(app, path, given | {"stream": stream}).status_code == 200
    plain, null = script.asked
    assert replace(null.params, seed=0) == replace(plain.params, seed=0)
    assert null.prompt_ids == plain.prompt_ids


@pytest.mark.parametrize(("fields", "choices"), [({"n": 3, "best_of": 3}, 3), ({"best_of": 1}, 1), ({"n": None}, 1)])
def test_best_of_may_be_said_where_it_is_n(app: FastAPI, fields: dict[str, Any], choices: int) -> None:
    answer = post(app, "/v1/completions", {"prompt": "a"} | fields)
    assert len(answer.json()["choices"]) == choices


@pytest.mark.parametrize("seed", [7, -7])
def test_a_seeded_prompt_is_answered_alike_alone_and_in_a_list(app: FastAPI, script: Script, seed: int) -> None:
    ask(app, prompt=["a", "the"], n=2, seed=seed)
    ask(app, prompt="the", n=2, seed=seed)
    in_list, alone = script.asked[2:4], script.asked[4:]
    assert [request.prompt_ids for request in in_list] == [request.prompt_ids for request in alone]
    assert [request.params for request in in_list] == [request.params for request in alone]
    assert alone[0].params.seed != alone[1].params.seed


def test_sixteen_tokens_are_the_default(app: FastAPI, script: Script) -> None:
    post(app, "/v1/completions", {"prompt": "a"})
    assert script.asked[0].params.max_tokens == 16


def test_echo_puts_the_prompt_first(app: FastAPI) -> None:
    assert ask(app, prompt="the fish", echo=True).choices[0].text == "the fish" + SAID
    chunks = stream(app, prompt="the fish", echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the fish" + SAID


@pytest.mark.parametrize("skip", [True, False])
def test_echo_gives_back_the_text_that_was_given(app: FastAPI, tokenizer: Tokenizer, skip: bool) -> None:
    text = f"{BOS} the — fish{EOS}"
    fields: Any = {"prompt": [text, "a"], "echo": True, "logprobs": 0}
    answer = ask(app, **fields, extra_body={"skip_special_tokens": skip})
    assert [choice.text for choice in answer.choices] == [text + SAID, "a" + SAID]
    chunks = stream(app, **fields, skip_special_tokens=skip)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == 0) == text + SAID
    logprobs = answer.choices[0].logprobs
    begins = [0, len(BOS), len(BOS) + 4, *[len(BOS) + 5] * 3, len(BOS) + 6, len(text) - len(EOS), len(text)]
    assert logprobs.text_offset[: len(begins)] == begins
    assert logprobs.tokens[len(begins) - 2] == EOS


def test_echo_of_token_ids_is_what_they_decode_to(app: FastAPI, tokenizer: Tokenizer) -> None:
    prompt = [0, *tokenizer.encode(" the fish")]
    assert ask(app, prompt=prompt, echo=True).choices[0].text == " the fish" + SAID
    shown = ask(app, prompt=prompt, echo=True, extra_body={"skip_special_tokens": False})
    assert shown.choices[0].text == f"{BOS} the fish" + SAID


def test_echo_with_logprobs_scores_the_prompt(app: FastAPI, script: Script, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(" the fish")
    for logprobs in (
        ask(app, prompt=prompt, echo=True, logprobs=2).choices[0].logprobs.model_dump(),
        joined(stream(app, prompt=prompt, echo=True, logprobs=2)),
    ):
        tokens = [*prompt, *script.answer]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx([-token / 100 for token in tokens[1:]])
        assert logprobs["tokens"][:2] == [" the", " fish"]
        assert logprobs["text_offset"][:4] == [0, 4, 9, 13]
        assert len(logprobs["tokens"]) == len(tokens)


def test_a_long_prompts_echo_is_streamed_as_it_is_answered(
    app: FastAPI, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written beside the event loop."""
    text_of, beside = tokenizer.token_text, list[str]()

    def watched(token: int) -> str:
        if threading.current_thread() is not threading.main_thread():
            beside.append(text_of(token))
        return text_of(token)

    monkeypatch.setattr(tokenizer, "token_text", watched)
    prompt = [0, *tokenizer.encode(" the fish — swim\x85far" * 5)]
    assert len(prompt) > MANY_TOKENS
    fields: Any = {"prompt": [prompt, [5]], "echo": True, "logprobs": 2}
    whole = [choice.model_dump() for choice in ask(app, **fields).choices]
    beside.clear()
    chunks = stream(app, **fields)
    assert beside[: len(prompt)] == list(map(text_of, prompt))
    for index, choice in enumerate(whole):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert joined(own) == choice["logprobs"]
        assert "".join(chunk["choices"][0]["text"] for chunk in own) == choice["text"]


def joined(chunks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}


def test_scores_alone_need_no_answer(app: FastAPI) -> None:
    answer = ask(app, prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=0)
    choice = answer.choices[0]
    assert choice.logprobs.token_logprobs == [None, -0.06, -0.07]
    assert (answer.usage.completion_tokens, choice.finish_reason) == (0, "length")


def test_logprobs_of_the_answer_have_offsets(app: FastAPI, script: Script) -> None:
    logprobs = ask(app, prompt="a", logprobs=1).choices[0].logprobs
    assert logprobs.tokens[:3] == [" the", " whale", " swim"]
    assert logprobs.text_offset[:4] == [0, 4, 10, 15]
    assert logprobs.token_logprobs == pytest.approx([-token / 100 for token in script.answer])


def test_streams_end_with_usage_when_asked(app: FastAPI, script: Script) -> None:
    chunks = stream(app, prompt=[5, 6], stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(script.answer)
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_stop_strings_end_completions_too(app: FastAPI) -> None:
    assert ask(app, prompt="a", stop=["far"]).choices[0].text == SAID.split("far")[0]
