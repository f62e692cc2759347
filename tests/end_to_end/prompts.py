"""The requests of the end-to-end tests."""

import random
from typing import Any

from tests.end_to_end.streams import Body

SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
NUMBERS = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": SCHEMA}}
"""Longer than any answer, so that each has all its tokens."""


def prompts(count: int) -> list[list[int]]:
    """Random prompts of 3 to 60 tokens, always the same."""
    rng = random.Random(7)
    return [[rng.randrange(2, 2000) for _ in range(rng.randint(3, 60))] for _ in range(count)]


def greedy_bodies(model: str, count: int, tokens: int) -> list[Body]:
    return [_body(model, prompt, tokens, temperature=0.0) for prompt in prompts(count)]


def mixed_bodies(model: str, count: int, tokens: int) -> list[Body]:
    """Greedy and seeded ones, with penalties, with several choices, and JSON of a schema."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "n": 2},
        {"temperature": 1.2, "top_k": 50, "presence_penalty": 0.5},
        {"temperature": 1.0, "response_format": NUMBERS, "ignore_eos": False},
    ]
    return [
        _body(model, prompt, tokens, seed=index, **kinds[index % len(kinds)])
        for index, prompt in enumerate(prompts(count))
    ]


def _body(model: str, prompt: list[int], tokens: int, **params: Any) -> Body:
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **params}
