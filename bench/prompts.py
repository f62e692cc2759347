"""Prompts of random tokens: no two of a run share a beginning, so no cached prefix helps anybody."""

import random

from bench.timing import Prompts, Workload

SPECIAL_TOKENS = 2  # ids that a bench checkpoint keeps for the beginning and the end


def draw_prompts(key: str, batch: int, tokens: int, vocabulary: int) -> Prompts:
    """`batch` prompts of `tokens` tokens each, the same for the same key on every machine."""
    generator = random.Random(key)
    return tuple(tuple(generator.randrange(SPECIAL_TOKENS, vocabulary) for _ in range(tokens)) for _ in range(batch))


def draw_workload(key: str, batch: int, tokens: int, vocabulary: int, decode_tokens: int) -> Workload:
    return Workload(draw_prompts(key, batch, tokens, vocabulary), decode_tokens)
