"""The model in this repository: an ordinary checkpoint to us and to transformers, small, and made by its recipe."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from examples.bundled.untrained import CONFIG
from model.checkpoint import Checkpoint
from model.config import parse_config
from model.generation import read_generation_defaults
from model.tokenizer import Tokenizer

MOST_BYTES = 10_000_000  # that a clone of the repository should have to carry


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Tokenizer:
    return Tokenizer.load(bundled)


@pytest.fixture(scope="module")
def theirs(bundled: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(bundled / "tokenizer.json"))


def test_it_is_small_and_of_the_recipes_shape(bundled: Path) -> None:
    assert sum(path.stat().st_size for path in bundled.iterdir()) < MOST_BYTES
    assert Checkpoint.open(bundled).config == parse_config(CONFIG)


def test_it_matches_its_tokenizer(bundled: Path, tokenizer: Tokenizer) -> None:
    config = Checkpoint.open(bundled).config
    assert config.topk_method == "group_limited_greedy"
    assert config.vocab_size == tokenizer.vocab_size
    assert tokenizer.is_special(config.eos_token_ids[0])
    assert read_generation_defaults(bundled).temperature == 0.0


def test_transformers_loads_it_with_every_weight_used(bundled: Path) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(bundled, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.lm_head.weight, Checkpoint.open(bundled).tensor("lm_head.weight"))
    assert len(AutoTokenizer.from_pretrained(bundled)) == loaded.config.vocab_size


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(
    text=st.text()
    | st.lists(st.sampled_from(["User:", "sea", " Assistant:", "\n\n", "é", "<|end_of_sentence|>"])).map("".join)
)
def test_ids_are_transformers(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.encode(text) == theirs(text)["input_ids"]
