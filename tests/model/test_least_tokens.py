"""What a text's length alone says of its tokens, and where it says nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer, byte_alphabet

SPLIT: dict[str, Any] = {"type": "Split", "pattern": {"Regex": "\\s?\\p{L}+"}, "behavior": "Isolated", "invert": False}
BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}
AS_DEEPSEEK: dict[str, Any] = {"type": "Sequence", "pretokenizers": [SPLIT, DIGITS, BYTES]}
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def ours(small: Path) -> Tokenizer:
    return Tokenizer.load(small)


def changed(copy: Path, change: Change) -> Tokenizer:
    raw = json.loads((copy / "tokenizer.json").read_text())
    change(raw)
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    return Tokenizer.load(copy)


@given(data=st.data(), special=st.booleans())
def test_no_text_has_fewer_tokens(ours: Tokenizer, data: st.DataObject, special: bool) -> None:
    names = [ours.token_text(token) for token in range(ours.vocab_size)]
    text = "".join(data.draw(st.lists(st.text() | st.sampled_from(names), max_size=20)))
    assert ours.least_tokens(text) <= len(ours.encode(text, special))


def test_the_longest_tokens_alone_are_counted_exactly(ours: Tokenizer) -> None:
    names = [ours.token_text(token) for token in range(ours.vocab_size)]
    longest = max((name for name in names if name.isascii()), key=len)
    assert len(ours.encode(longest, False)) == 1
    assert ours.least_tokens(longest) == 1
    assert ours.least_tokens(longest * 50) == 50
    assert ours.least_tokens(longest * 50 + "a") == 51
    assert ours.least_tokens("") == 0


def test_a_token_that_was_added_may_be_the_longest(copy: Path) -> None:
    name = "<" + "very " * 20 + "long>"
    added = {"content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = changed(
        copy, lambda raw: raw["added_tokens"].append(added | {"id": len(raw["model"]["vocab"]), "special": False})
    )
    assert tokenizer.least_tokens(name * 50) == len(tokenizer.encode(name * 50)) == 50


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(normalizer={"type": "Sequence", "normalizers": []}, pre_tokenizer=AS_DEEPSEEK),
        lambda raw: raw.update(post_processor=BYTES | {"add_prefix_space": True}),
        lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True),
    ],
    ids=["DeepSeek's", "byte-level offsets", "a space in front"],
)
def test_it_can_be_told_where_nothing_is_lost(copy: Path, ours: Tokenizer, change: Change) -> None:
    tokenizer = changed(copy, change)
    text = "Hello, the  world 12345 東京 <bos>" * 9
    assert tokenizer.least_tokens(text) == ours.least_tokens(text) > 0
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, False))


def replaced(found: str) -> Change:
    """Of a pre-tokenizer that drops what it finds."""
    split = SPLIT | {"pattern": {"Regex": found}, "behavior": "Removed"}
    return lambda raw: raw.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, BYTES]})


def blind_to_a_byte(raw: dict[str, Any]) -> None:
    letter = byte_alphabet()[ord("a")]
    model = raw["model"]
    model["merges"] = [pair for pair in model["merges"] if letter not in "".join(pair)]
    kept = {name for name in model["vocab"] if letter not in name}
    model["vocab"] = {name: number for name, number in model["vocab"].items() if name in kept}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}), " " * 999),
        (replaced("\\s+"), " " * 999),
        (blind_to_a_byte, "a" * 999),
        (lambda raw: raw["added_tokens"][0].update(lstrip=True), " " * 999 + "<bos>"),
        (lambda raw: raw["added_tokens"][0].update(rstrip=True), "<bos>" + " " * 999),
        (
            lambda raw: raw.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
                }
            ),
            "x" * 999,
        ),
        (lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}), "é" * 999),
        (lambda raw: raw.update(pre_tokenizer=DIGITS), "é" * 999),
        (lambda raw: raw["model"].update(continuing_subword_prefix="##", merges=[]), "ab" * 999),
        (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), "a b " * 999),
    ],
    ids=[
        "normalised",
        "split off",
        "no such byte",
        "blanks before",
        "blanks after",
        "template",
        "words",
        "no bytes",
        "##",
        "</w>",
    ],
)
def test_where_some_of_a_text_may_be_lost_nothing_is_told(copy: Path, change: Change, text: str) -> None:
    tokenizer = changed(copy, change)
    assert tokenizer.least_tokens(text) == 0
