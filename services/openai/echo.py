"""A prompt that is given back before its answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from attention.requests import TokenLogprob
from model.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """Its text, where each token's text begins in it, in characters, and the tokens' scores, if asked for."""

    text: str = ""
    tokens: Sequence[int] = ()
    offsets: Sequence[int] = ()
    scores: Sequence[TokenLogprob | None] = ()


def echo_text(text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> Echo:
    """Of a prompt that came as text: just that text, whatever its tokens decode to."""
    tokens, offsets = tokenizer.encode_with_offsets(text, add_special_tokens)
    return Echo(text, tokens, offsets)


def echo_tokens(tokens: Sequence[int], tokenizer: Tokenizer, skip_special_tokens: bool) -> Echo:
    """Of a prompt that came as token ids: the text that they decode to."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    pieces: list[str] = []
    offsets: list[int] = []
    length = 0
    for token in tokens:
        offsets.append(length)
        pieces.append(detokenizer.push(token))
        length += len(pieces[-1])
    return Echo("".join(pieces) + detokenizer.flush(), tokens, offsets)
