"""The bundled model before its training: an ordinary small DeepSeek-V2, and a tokenizer that spells."""

import string
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.bundled import untrained
from examples.bundled.tokenizer import BOS, EOS, VOCABULARY_SIZE, build_tokenizer
from model.checkpoint import Checkpoint
from model.tokenizer import Detokenizer, Tokenizer

SPELLS = build_tokenizer()
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "reverse stone"},
    {"role": "assistant", "content": "enots"},
    {"role": "user", "content": "7 + 15"},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.write_untrained(tmp_path_factory.mktemp("untrained") / "model")


@given(st.text())
def test_text_survives(text: str) -> None:
    assert SPELLS.decode(SPELLS.encode(text).ids, skip_special_tokens=False) == text


@given(st.text(string.ascii_letters + string.digits + " ,+-?'\"", max_size=60))
def test_a_character_is_a_token(text: str) -> None:
    assert len(SPELLS.encode(text).ids) == len(text)


def test_the_speakers_are_tokens_too(path: Path) -> None:
    ids = Tokenizer.load(path).apply_chat_template(CHAT)
    names = [str(SPELLS.id_to_token(token)) for token in ids]
    assert "".join(names) == (f"{BOS}BeĠbrief.ĊĊUser:ĠreverseĠstoneĊĊAssistant:Ġenots{EOS}User:Ġ7Ġ+Ġ15ĊĊAssistant:")
    assert [name for name in names if len(name) > 1] == [
        BOS, "ĊĊ", "User:", "ĊĊ", "Assistant:", EOS, "User:", "ĊĊ", "Assistant:",
    ]  # fmt: skip
    assert AutoTokenizer.from_pretrained(path).apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] == ids


def test_an_answer_in_any_script_is_streamed(path: Path) -> None:
    detokenizer = Detokenizer(Tokenizer.load(path))
    pieces = [detokenizer.push(token) for token in SPELLS.encode("doré 🐟").ids]
    assert "".join(pieces) + detokenizer.flush() == "doré 🐟"


def test_it_is_a_small_deepseek_v2_to_us_and_to_transformers(path: Path) -> None:
    config = Checkpoint.open(path).config
    assert config.q_lora_rank is not None
    assert config.topk_method == "group_limited_greedy"
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (4, 2, 1)
    assert config.vocab_size == VOCABULARY_SIZE == SPELLS.get_vocab_size()
    loaded, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    numbers = sum(parameter.numel() for parameter in loaded.parameters())
    assert numbers * 4 < 10_000_000
    with torch.no_grad():
        logits = loaded(torch.tensor([Tokenizer.load(path).apply_chat_template(CHAT)])).logits
    assert 0.1 < logits.std() < 3  # nothing is preferred before it has learned


def test_two_writings_have_the_same_bytes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["untrained", str(tmp_path / "again")])
    assert untrained.main() == 0
    for file in path.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert untrained.main() == 1  # in use
