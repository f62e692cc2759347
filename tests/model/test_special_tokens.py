"""Special tokens: what the files beside tokenizer.json name is special, as transformers has it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from model.checkpoint import CheckpointError
from model.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<x>Hi"}]
X = {"content": "<x>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
LAST = {str(number): X | {"content": token, "special": True} for number, token in enumerate(("<bos>", "<eos>"))}


def write(copy: Path, edit: Callable[[Any], object] = lambda raw: None, **fields: object) -> Path:
    """The tokenizer with an edited tokenizer.json, and these fields alone in its tokenizer_config.json."""
    raw = json.loads((copy / "tokenizer.json").read_text())
    edit(raw)
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    (copy / "special_tokens_map.json").unlink(missing_ok=True)
    (copy / "tokenizer_config.json").write_text(json.dumps(fields))
    return copy


def next_id(copy: Path) -> str:
    return str(len(json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"]))


def unlisted(raw: Any) -> None:
    raw["added_tokens"] = []


def ordinary(raw: Any) -> None:
    for token in raw["added_tokens"]:
        token["special"] = False


def assert_transformers(directory: Path) -> None:
    ours, theirs = Tokenizer.load(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    text = ours.chat_text(MESSAGES, add_generation_prompt=False)
    assert text.startswith("<bos>User: Hello")
    assert text.endswith("<eos>")
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (0, 1)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert "<eos>" not in ours.decode(ids)
    assert ours.is_special(0)
    assert ours.is_special(1)


@pytest.mark.parametrize("edit", [unlisted, ordinary], ids=["not listed", "not special"])
@pytest.mark.parametrize("eos", ["<eos>", X | {"__type": "AddedToken", "content": "<eos>"}], ids=["text", "object"])
def test_tokens_that_the_config_names_are_special(copy: Path, edit: Callable[[Any], object], eos: object) -> None:
    assert_transformers(write(copy, edit, bos_token="<bos>", eos_token=eos))


@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
def test_further_special_tokens_are_special(copy: Path, name: str) -> None:
    directory = write(copy, unlisted, bos_token="<bos>", **{name: ["<eos>"]})
    assert Tokenizer.load(directory).encode("Hello<eos>")[-1] == 1
    assert Tokenizer.load(directory).is_special(1)


def test_tokens_may_be_named_in_a_file_of_their_own(copy: Path) -> None:
    directory = write(copy)
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": X | LAST["1"]}))
    assert_transformers(directory)


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_the_config_adds_is_one(copy: Path, special: bool) -> None:
    """Of which special_tokens_map.json is not asked: where tokens are listed, it is an older file."""
    number = next_id(copy)
    listed = LAST | {number: X | {"special": special}}
    directory = write(copy, bos_token="<bos>", eos_token="<eos>", added_tokens_decoder=listed)
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<bos>"}')
    assert_transformers(directory)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("<x>") == [int(number)]
    assert tokenizer.is_special(int(number)) == special


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"eos_token": "<end>"}, "eos_token is '<end>'; expected a token of tokenizer.json"),
        ({"bos_token": ["<bos>"]}, r"bos_token is \['<bos>'\]; expected a token, or an object with its content"),
        ({"bos_token": {"__type": "AddedToken"}}, "bos_token is {'__type': 'AddedToken'}; expected a token"),
        ({"additional_special_tokens": [3]}, "additional_special_tokens is 3; expected a token"),
        ({"additional_special_tokens": "<x>"}, "additional_special_tokens is '<x>'; expected a list of tokens"),
        ({"extra_special_tokens": 3}, "extra_special_tokens is 3; expected a list of tokens, or tokens by name"),
        ({"added_tokens_decoder": ["<x>"]}, r"added_tokens_decoder is \['<x>'\]; expected tokens by their ids"),
        ({"added_tokens_decoder": {"one": X}}, r"added_tokens_decoder is {'one': .*; expected tokens by their ids"),
        ({"added_tokens_decoder": {"1": None}}, r"added_tokens_decoder\.1 is None; expected a token"),
    ],
)
def test_what_is_no_token_is_named(copy: Path, fields: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {said}"):
        Tokenizer.load(write(copy, **fields))


def test_a_token_that_no_template_prints_may_be_unknown(copy: Path) -> None:
    tokenizer = Tokenizer.load(write(copy, bos_token="<bos>", pad_token="<pad>"))
    assert tokenizer.decode(tokenizer.encode("<pad>")) == "<pad>"
