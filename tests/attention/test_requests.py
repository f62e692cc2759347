"""What crosses to a worker comes out as it was, and what no worker could compute does not come out."""

import json

import pytest

from attention.requests import GenerateRequest, SamplingParams

ASKED = {"id": "a", "prompt_ids": [5, 6], "params": {"max_tokens": 3, "temperature": 0}}


def test_a_request_comes_back_from_json_as_it_was() -> None:
    params = SamplingParams(max_tokens=3, logit_bias=((7, 1.5),), stop_token_ids=(8,), logprobs=2)
    request = GenerateRequest("a", (5, 6), params, (9,))
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


@pytest.mark.parametrize("field", ["max_tokens", "min_tokens", "seed", "top_k", "logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [1.0, True, "1", [1]])
def test_numbers_that_are_no_integers_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*; expected an integer"):
        GenerateRequest.from_json_dict(ASKED | {"params": {"max_tokens": 3, field: value}})
