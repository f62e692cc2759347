"""From tokens to the text a client may see: whole characters only, and never the beginning of a stop string."""

from dataclasses import dataclass

from attention.requests import TokenLogprob
from model.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token whose text was given out; `offset` counts characters from the start of the answer."""

    token_id: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, the tokens it came from, and whether a stop string ended the answer."""

    text: str
    tokens: tuple[ShownToken, ...] = ()
    stopped: bool = False


class TextStream:
    """One answer's text. Feed tokens with `push`; call `finish` at the end unless a piece was `stopped`.

    Stop strings are looked for in the text that comes after the first `min_tokens` tokens. `include_stop` shows what
    ended the answer, string or token.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: list[str], skip_special_tokens: bool, include_stop: bool, min_tokens: int
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._stops = stops
        self._min_tokens = min_tokens
        self._pushed = 0  # tokens
        self._include_stop = include_stop
        self._held = ""  # text not given out yet
        self._shown = 0  # characters given out
        self._tokens: list[ShownToken] = []

    def push(self, token: int, logprob: TokenLogprob | None = None, ends: bool = False) -> Piece:
        """The piece that `token` makes certain, perhaps an empty one. What `ends` the answer is no part of its text."""
        self._pushed += 1
        self._tokens.append(ShownToken(token, self._shown + len(self._held), logprob))
        if self._include_stop or not ends:
            self._held += self._detokenizer.push(token)
        return self._advance(hold=True)

    def finish(self) -> Piece:
        """Everything that was kept back."""
        self._held += self._detokenizer.flush()
        piece = self._advance(hold=False)
        return piece if piece.stopped else Piece(piece.text, piece.tokens + self._release(None))

    def _advance(self, hold: bool) -> Piece:
        found = [(at, len(stop)) for stop in self._sought if (at := self._held.find(stop)) >= 0]
        if found:
            at, length = min(found)
            cut = at + length if self._include_stop else at
            return Piece(self._give(cut), self._release(self._shown), stopped=True)
        keep = self._beginning_of_stop() if hold else 0
        text = self._give(len(self._held) - keep)
        return Piece(text, self._release(self._shown) if text else ())

    @property
    def _sought(self) -> list[str]:
        """Stop strings that may end the answer where it is now; none is begun by text that was given out before."""
        return self._stops if self._pushed > self._min_tokens else []

    def _beginning_of_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = 0
        for stop in self._sought:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._shown += length
        return text

    def _release(self, before: int | None) -> tuple[ShownToken, ...]:
        """Tokens whose text begins before `before`, or all that are left."""
        count = sum(1 for token in self._tokens if before is None or token.offset < before)
        tokens, self._tokens = tuple(self._tokens[:count]), self._tokens[count:]
        return tokens
