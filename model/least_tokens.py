"""How few tokens a text can have, by its length alone."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

KEEPING = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
"""What Split may do with what it finds; else it removes it."""


def longest_token(fast: FastTokenizer, byte_alphabet: Iterable[str]) -> int | None:
    """The most characters of a text that one of its tokens can stand for; None where that is not certain.

    It is for byte-level BPE that neither normalises a text nor leaves out any of it: a character becomes one or more
    letters of the byte alphabet, each letter is part of one token, and a token stands for as many as its name has.
    """
    added = list(fast.get_added_tokens_decoder().values())
    vocabulary = fast.get_vocab(with_added_tokens=False)
    splits = _parts(_described(fast.pre_tokenizer), "pretokenizers")
    certain = (
        isinstance(fast.model, models.BPE)
        and not fast.model.continuing_subword_prefix
        and not fast.model.end_of_word_suffix
        and all(letter in vocabulary for letter in byte_alphabet)  # BPE leaves out what no token has
        and not _parts(_described(fast.normalizer), "normalizers")
        and all(_keeps(split) for split in splits)
        and any(split["type"] == "ByteLevel" for split in splits)
        and all(_adds(processor) for processor in _parts(_described(fast.post_processor), "processors"))
        and fast.truncation is None
        and not any(token.lstrip or token.rstrip for token in added)  # these take any number of blanks with them
    )
    return max(map(len, [*vocabulary, *(token.content for token in added)])) if certain else None


def _described(component: Any) -> dict[str, Any] | None:
    """A part of a tokenizer, as tokenizer.json has it."""
    described: dict[str, Any] | None = None if component is None else json.loads(component.__getstate__())
    return described


def _parts(described: dict[str, Any] | None, of: str) -> list[dict[str, Any]]:
    """What a part consists of, in order."""
    if described is None:
        return []
    if described["type"] == "Sequence":
        return [part for inner in described[of] for part in _parts(inner, of)]
    return [described]


def _keeps(split: dict[str, Any]) -> bool:
    """Whether the pieces joined are all of the text."""
    return split["type"] in ("ByteLevel", "Digits") or (split["type"] == "Split" and split["behavior"] in KEEPING)


def _adds(processor: dict[str, Any]) -> bool:
    """Whether every token of the text stays."""
    if processor["type"] == "TemplateProcessing":
        return any(piece.get("Sequence", {}).get("id") == "A" for piece in processor["single"])
    return bool(processor["type"] == "ByteLevel")
