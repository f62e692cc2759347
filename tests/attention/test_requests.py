"""What crosses between an ingress and a worker comes out as it was, and what no worker could compute does not."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from attention.requests import GenerateRequest, SamplingParams, TokenLogprob, Update

ASKED = {"id": "a", "prompt_ids": [5, 6], "params": {"max_tokens": 3, "temperature": 0}}
PARAMS = SamplingParams(
    max_tokens=9,
    seed=7,
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    min_p=0.125,
    presence_penalty=-0.5,
    frequency_penalty=0.75,
    repetition_penalty=1.5,
    logit_bias=((3, -1.5), (4, 100.0)),
    min_tokens=2,
    ignore_eos=True,
    stop_token_ids=(5, 6),
    logprobs=0,
    prompt_logprobs=2,
)
JSON = SamplingParams(max_tokens=9, json_schema='{"type": "object"}')  # which neither end nor length may contradict
SCORES = (TokenLogprob(3, -0.25, ((3, -0.25), (9, -1.5))), TokenLogprob(4, -2.0))


def test_a_request_survives_the_wire_with_every_field() -> None:
    plain = SamplingParams(max_tokens=9)
    for one in fields(plain)[1:]:
        assert any(getattr(params, one.name) != getattr(plain, one.name) for params in (PARAMS, JSON))
    for params in (PARAMS, JSON):
        request = GenerateRequest("r", (1, 2), params, (8,))
        assert GenerateRequest.from_json_dict(json.loads(json.dumps(request.to_json_dict()))) == request
    assert GenerateRequest.from_json_dict(ASKED).params == SamplingParams(max_tokens=3, temperature=0)


def test_a_long_prompt_is_not_copied_on_its_way_to_json() -> None:
    """Which an event loop waits for."""
    request = GenerateRequest("a", tuple(range(9)), SamplingParams(max_tokens=3), (9, 10))
    raw = request.to_json_dict()
    assert raw["prompt_ids"] is request.prompt_ids
    assert raw["resumed_ids"] is request.resumed_ids


@pytest.mark.parametrize("field", ["prompt_ids", "resumed_ids", "stop_token_ids"])
@pytest.mark.parametrize("tokens", ["ab", [1.5], [True], [None], [[1]], {"1": 2}])
def test_tokens_that_are_no_integers_are_refused(field: str, tokens: object) -> None:
    raw = ASKED | {field: tokens}
    if field == "stop_token_ids":
        raw = ASKED | {"params": {"max_tokens": 3, field: tokens}}
    with pytest.raises(ValueError, match=f"{field} is .*; expected integers"):
        GenerateRequest.from_json_dict(raw)


@pytest.mark.parametrize("given", [{"ignore_eos": True}, {"min_tokens": 2}])
def test_json_ends_where_it_is_whole(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))} is .*; expected it left out: JSON ends"):
        replace(JSON, **given)


@pytest.mark.parametrize("field", ["max_tokens", "min_tokens", "seed", "top_k", "logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [1.0, True, "1", [1]])
def test_numbers_that_are_no_integers_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*; expected an integer"):
        GenerateRequest.from_json_dict(ASKED | {"params": {"max_tokens": 3, field: value}})


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"token_ids": (3, 4)},
        {"token_ids": (3, 4), "logprobs": SCORES},
        {"logprobs": ()},
        {"prompt_logprobs": (None, *SCORES)},
        {"prompt_logprobs": ()},
        {"finish_reason": "stop"},
        {"finish_reason": "error", "error": "no room"},
        {"cached_tokens": 16},
    ],
)
def test_an_update_survives_the_wire(changed: dict[str, object]) -> None:
    update = replace(Update("r"), **changed)
    assert Update.from_json_dict(json.loads(json.dumps(update.to_json_dict()))) == update
