"""Which tokens may come next so that an answer is JSON of a schema, by llguidance. A function of the answer so far.

JSON is written on one line, with a space after each colon and comma: a model that may write blanks may write nothing
else. A schema's own `x-guidance` says otherwise. A space may come before it, as DeepSeek-V2 begins every answer.
"""

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT = 32  # schemas, compiled
MOST_MULTIPLE = 20_000
STYLE: Any = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


def check_schema(schema: str) -> None:
    """Raises ValueError saying what of a JSON schema, as JSON text, is wrong or has no grammar."""
    from llguidance import LLMatcher

    if (multiple := _common_multiple(_read(schema))) > MOST_MULTIPLE:
        raise ValueError(
            f"multiples of {multiple} or more are asked for; expected a least common multiple of all multipleOf of at "
            f"most {MOST_MULTIPLE}: a grammar has a state for each remainder"
        )
    if fault := LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema, defaults=STYLE)):
        raise ValueError(fault)


class Grammar:
    """One answer's, as far as it has come."""

    def __init__(self, matcher: "LLMatcher", ends: Collection[int]) -> None:
        self._matcher = matcher
        self._ends = ends

    def allowed(self) -> bytes:
        """A bit for each token, the lowest of a byte first: whether it may come next. End tokens may at an end.

        Raises ValueError where the grammar became too complex to go on, or nothing fits it.
        """
        mask = bytes(self._matcher.compute_bitmask())
        self._check()
        return mask

    def take(self, tokens: Sequence[int]) -> None:
        """Go on behind these; raises ValueError for one that may not come there."""
        for token in tokens:
            ended = token in self._ends and self._matcher.is_stopped()  # where it allows an end, and takes none
            if not ended:
                self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the answer cannot go on as its schema wants: {_fault(self._matcher)}")


class Grammars:
    """Of one model. Several threads may use it; the first use reads the tokenizer, which takes up to a second."""

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`directory` has the tokenizer; the model's vocabulary may be larger than that."""
        self._directory = directory
        self._vocab_size = vocab_size
        self._ends = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def begin(self, schema: str) -> Grammar:
        """At the beginning of an answer; raises ValueError where there is no grammar for the schema or the model."""
        from llguidance import LLMatcher

        with self._lock:
            matcher = self._compiled.get(schema)
            if matcher is None:
                check_schema(schema)
                matcher = LLMatcher(self._words(), _grammar(schema), log_level=0)
                if matcher.is_error():
                    raise ValueError(f"no grammar for the schema: {_fault(matcher)}")
                self._compiled[schema] = matcher
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            else:
                self._compiled.move_to_end(schema)
            return Grammar(matcher.deep_copy(), self._ends)

    def _words(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        from model.tokenizer import Tokenizer

        if self._tokenizer is None:
            if not self._ends:
                raise ValueError("the model has no end token, which would end JSON: leave response_format out")
            written = Tokenizer.load(self._directory).to_json()
            self._tokenizer = LLTokenizer(written, n_vocab=self._vocab_size, eos_token=self._ends)
        return self._tokenizer


def _fault(matcher: "LLMatcher") -> str:
    """Without the state of the parser, which follows."""
    return " ".join(matcher.get_error().partition("\n<state>")[0].split())


def _grammar(schema: str) -> str:
    """Of a schema that was checked."""
    from llguidance import LLMatcher

    given = _read(schema)
    styled = json.dumps(given | {"x-guidance": STYLE | given.get("x-guidance", {})})
    return LLMatcher.grammar_from_lark(f'start: " "? json\njson: %json {styled}\n')


def _common_multiple(schema: Any) -> int:
    """Of all `multipleOf`, without their decimals' scale; no more is looked at than what is already too much."""
    found, waiting = 1, [schema]
    while waiting and found <= MOST_MULTIPLE:
        part = waiting.pop()
        if isinstance(part, dict):
            value = part.get("multipleOf")
            if isinstance(value, int | float) and value > 0:
                large = value > MOST_MULTIPLE  # and perhaps beyond what a float holds
                found = math.lcm(found, MOST_MULTIPLE + 1 if large else Fraction(str(float(value))).numerator)
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return found


def _read(schema: str) -> dict[str, Any]:
    """Raises ValueError for what is no schema, or whose `x-guidance` is no object."""
    given = json.loads(schema)
    if not isinstance(given, dict):
        raise ValueError(f"a schema is {given!r:.100}; expected an object")
    if not isinstance(style := given.get("x-guidance", {}), dict):
        raise ValueError(f"x-guidance is {style!r:.100}; expected an object")
    return given
