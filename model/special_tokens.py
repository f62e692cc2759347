"""Special tokens as tokenizer_config.json and special_tokens_map.json name them, beside those of tokenizer.json."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from model.json_file import read_object
from model.safetensors_header import CheckpointError

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
LISTED = "added_tokens_decoder"  # tokens that stand outside the vocabulary, by their ids
PRINTED = ("bos_token", "eos_token")  # by nearly every chat template
NAMES = (*PRINTED, "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FURTHER = ("additional_special_tokens", "extra_special_tokens")  # lists of them
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json; the tokens are special_tokens_map.json's where it lists none itself, as in older layouts.

    Empty where there is neither. Raises CheckpointError for what is no JSON object.
    """
    config, named = (
        read_object(directory / name, CheckpointError, "") if (directory / name).exists() else {}
        for name in (CONFIG, MAP)
    )
    return config if LISTED in config else config | {key: named[key] for key in (*NAMES, *FURTHER) if key in named}


def named_token(tokenizer_config: Mapping[str, Any], name: str) -> str | None:
    """The text of a special token, which may be written as an object; None where there is none.

    Raises CheckpointError for anything else.
    """
    value = tokenizer_config.get(name)
    return None if value is None else _text(value, name)


def add_special_tokens(fast: FastTokenizer, config: Mapping[str, Any]) -> None:
    """Have texts encoded and decoded by the tokens that the config names, as transformers does.

    tokenizer.json need not say that a token of its vocabulary is special, or that text is never merged across it.
    Raises CheckpointError for a first or last token that it lacks: templates would print letters that nobody learned.
    """
    known = {token.content for token in fast.get_added_tokens_decoder().values()}
    fast.add_tokens([token for token in _listed(config) if token.content not in known])
    for name in PRINTED:
        token = named_token(config, name)
        if token and fast.token_to_id(token) is None:
            raise CheckpointError(
                f"{CONFIG}: {name} is {token!r}; expected a token of tokenizer.json, as chat templates print it"
            )
    special = {token.content for token in fast.get_added_tokens_decoder().values() if token.special}
    fast.add_special_tokens(
        [token for token in _named(config) if token not in special and fast.token_to_id(token) is not None]
    )


def _listed(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    listed = config.get(LISTED) or {}
    if not isinstance(listed, dict) or not all(number.isdecimal() for number in listed):
        raise CheckpointError(f"{CONFIG}: {LISTED} is {listed!r:.200}; expected tokens by their ids")
    for number in sorted(listed, key=int):
        token, where = listed[number], f"{LISTED}.{number}"
        flags = {flag: token[flag] for flag in FLAGS if isinstance(token, dict) and isinstance(token.get(flag), bool)}
        special = isinstance(token, dict) and token.get("special") is True
        yield AddedToken(_text(token, where), special=special, **flags)


def _named(config: Mapping[str, Any]) -> Iterator[str]:
    yield from (token for name in NAMES if (token := named_token(config, name)))
    for name in FURTHER:
        further = config.get(name) or []
        if not isinstance(further, list | dict):
            raise CheckpointError(f"{CONFIG}: {name} is {further!r:.200}; expected a list of tokens, or tokens by name")
        for token in further.values() if isinstance(further, dict) else further:
            yield _text(token, name)


def _text(value: Any, name: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise CheckpointError(f"{CONFIG}: {name} is {value!r:.200}; expected a token, or an object with its content")
    return text
