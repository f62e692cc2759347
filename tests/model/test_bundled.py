"""The bundled model: the same bytes wherever it is made, and an ordinary checkpoint to us and to transformers."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from model.bundled import main, write_bundled
from model.checkpoint import Checkpoint, CheckpointError
from model.generation import read_generation_defaults
from model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Tokenizer:
    return Tokenizer.load(bundled)


@pytest.fixture(scope="module")
def theirs(bundled: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(bundled / "tokenizer.json"))


def test_two_writings_have_the_same_bytes(bundled: Path, tmp_path: Path) -> None:
    again = write_bundled(tmp_path / "again")
    names = sorted(path.name for path in bundled.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert "model.safetensors" in names
    for name in names:
        assert (again / name).read_bytes() == (bundled / name).read_bytes(), name


def test_it_opens_as_a_checkpoint_that_matches_its_tokenizer(bundled: Path, tokenizer: Tokenizer) -> None:
    config = Checkpoint.open(bundled).config
    assert config.topk_method == "group_limited_greedy"
    assert config.vocab_size == tokenizer.vocab_size
    assert tokenizer.is_special(config.eos_token_ids[0])
    assert read_generation_defaults(bundled).temperature == 0.7


def test_transformers_loads_it_with_every_weight_used(bundled: Path) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(bundled, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.lm_head.weight, Checkpoint.open(bundled).tensor("lm_head.weight"))
    assert len(AutoTokenizer.from_pretrained(bundled)) == loaded.config.vocab_size


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(
    text=st.text() | st.lists(st.sampled_from(["the ", "sea", " shoal", "\n", "é", "<|end_of_sentence|>"])).map("".join)
)
def test_ids_are_transformers(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.encode(text) == theirs(text)["input_ids"]


def test_its_words_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_text(token) for token in tokenizer.encode(" shoal of silver fish")] == [
        " shoal",
        " of",
        " silver",
        " fish",
    ]


def test_used_directory_is_refused(bundled: Path) -> None:
    with pytest.raises(CheckpointError, match="not an empty directory"):
        write_bundled(bundled)


def test_command_line_writes_once_and_explains_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["model.bundled", str(out)])
    assert main() == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert main() == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["model.bundled"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("usage: ")
