"""Texts whose tokens are counted before a run counts them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.prompts import draw_prompts
from bench.training import text_of
from model.tokenizer import Tokenizer


def test_a_text_has_the_tokens_that_were_asked_for(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.load(checkpoint("tiny"))
    for key in ("one", "two", "three"):
        (ids,) = draw_prompts(key, 1, 200, tokenizer.vocab_size)
        text = text_of(tokenizer, ids, 99)
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 99
    with pytest.raises(BenchError, match=r"200 random tokens has \d+ to train on; expected 5000"):
        text_of(tokenizer, ids, 5000)
