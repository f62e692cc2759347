"""Whatever is drawn of what a schema's grammar allows is JSON that fits it, judged by another library."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from model.grammar import Grammar, Grammars, check_schema
from model.tokenizer import Tokenizer

END, OTHER_END = 1, 0
BEYOND = 5  # ids that the model has and its tokenizer lacks
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "whale", "—"]}, "maxItems": 3},
        "friend": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/friend"}]},
    },
    "required": ["name", "age", "tags", "friend"],
    "additionalProperties": False,
    "$defs": {"friend": {"type": "object", "properties": {"id": {"type": "boolean"}}, "required": ["id"]}},
}
SCHEMAS: list[Any] = [
    PERSON,
    {"type": "object"},
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    {"enum": ["yes", "no", None, 3]},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"type": "integer"},
]


@pytest.fixture(scope="module")
def tokenizer(words: Path) -> Tokenizer:
    return Tokenizer.load(words)


@pytest.fixture(scope="module")
def grammars(words: Path, tokenizer: Tokenizer) -> Grammars:
    return Grammars(words, tokenizer.vocab_size + BEYOND, (END, OTHER_END))


def allowed(grammar: Grammar, vocabulary: int) -> list[int]:
    mask = grammar.allowed()
    return [token for token in range(vocabulary) if mask[token // 8] >> token % 8 & 1]


def draw(grammar: Grammar, tokenizer: Tokenizer, rng: random.Random, most: int = 400) -> Iterator[int]:
    """Allowed tokens, now and then one that closes something; the end where it may come."""
    closing = {tokenizer.encode(text, add_special_tokens=False)[0] for text in '"}]'}
    for _ in range(most):
        tokens = allowed(grammar, tokenizer.vocab_size)
        close = [token for token in tokens if token in closing]
        token = END if END in tokens else rng.choice(close if close and rng.random() < 0.5 else tokens)
        grammar.take([token])
        yield token
        if token == END:
            return
    raise AssertionError(f"no end in {most} tokens")


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_what_is_drawn_fits(grammars: Grammars, tokenizer: Tokenizer, schema: Any) -> None:
    for seed in range(8):
        *answer, end = draw(grammars.begin(json.dumps(schema)), tokenizer, random.Random(seed))
        assert end == END
        text = tokenizer.decode(answer)
        jsonschema.validate(json.loads(text), schema)
        assert "\n" not in text


def test_keys_come_in_the_schemas_order_and_blanks_after_colons_and_commas(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    properties = {name: {"const": number} for number, name in enumerate("zamb")}
    schema = {"type": "object", "properties": properties, "required": list("zamb"), "additionalProperties": False}
    *answer, _ = draw(grammars.begin(json.dumps(schema)), tokenizer, random.Random(0))
    assert tokenizer.decode(answer).strip() == '{"z": 0, "a": 1, "m": 2, "b": 3}'


def test_a_schema_may_say_how_it_is_written(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = {"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 3}
    styled = schema | {"x-guidance": {"item_separator": ","}}
    for given, text in ((schema, "[1, 1, 1]"), (styled, "[1,1,1]")):
        *answer, _ = draw(grammars.begin(json.dumps(given)), tokenizer, random.Random(0))
        assert tokenizer.decode(answer).strip() == text


def test_behind_what_was_drawn_before_it_allows_the_same(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema, vocabulary = json.dumps(PERSON), tokenizer.vocab_size + BEYOND
    whole = grammars.begin(schema)
    answer: list[int] = []
    for token in draw(grammars.begin(schema), tokenizer, random.Random(3)):
        resumed = grammars.begin(schema)
        resumed.take(answer)
        assert allowed(resumed, vocabulary) == allowed(whole, vocabulary)
        whole.take([token])
        answer.append(token)


def test_every_end_token_ends_and_what_the_tokenizer_lacks_is_never_drawn(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    grammar = grammars.begin('{"enum": [7]}')
    vocabulary = tokenizer.vocab_size + BEYOND
    space, seven = (tokenizer.encode(text, add_special_tokens=False) for text in " 7")
    assert allowed(grammar, vocabulary) == sorted(space + seven)
    grammar.take(space)
    assert allowed(grammar, vocabulary) == seven  # no second one
    grammar.take(seven)
    assert allowed(grammar, vocabulary) == sorted((END, OTHER_END))
    inside = grammars.begin('{"type": "string"}')
    inside.take(tokenizer.encode('"', add_special_tokens=False))
    assert max(allowed(inside, vocabulary)) < tokenizer.vocab_size


def test_a_token_that_may_not_come_is_refused(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.begin('{"type": "integer"}')
    with pytest.raises(ValueError, match=r"the answer cannot go on as its schema wants: .*doesn't satisfy"):
        grammar.take(tokenizer.encode("whale", add_special_tokens=False))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "bogus"}, "Invalid type: bogus"),
        ({"type": "object", "properties": 5}, "properties must be an object"),
        ({"type": "string", "pattern": "(?<=a)b"}, "look-around"),
        ({"$ref": "http://elsewhere/schema.json"}, "retriev"),
        ({"type": "integer", "multipleOf": 999_983}, "expected a least common multiple"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 99.1}]}, "expected a least common multiple"),
        ({"type": "integer", "multipleOf": 10**400}, "expected a least common multiple"),
        ({"not": {"type": "string"}}, "not"),
        ([], "expected an object"),
        (True, "expected an object"),
        ({"x-guidance": 5}, "x-guidance is 5; expected an object"),
        ({"x-guidance": None}, "x-guidance is None; expected an object"),
        ({"x-guidance": {"bogus": 1}}, "unknown field `bogus`"),
    ],
)
def test_a_schema_without_a_grammar_is_refused(grammars: Grammars, schema: Any, said: str) -> None:
    for check in (check_schema, grammars.begin):
        with pytest.raises(ValueError, match=f"(?s){said}"):
            check(json.dumps(schema))


def test_a_schema_that_nothing_fits_ends_in_an_error(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.begin('{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}')
    with pytest.raises(ValueError, match="the answer cannot go on as its schema wants: NoExtension"):
        list(draw(grammar, tokenizer, random.Random(0)))


def test_multiples_are_kept_to(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = {"type": "array", "minItems": 3, "maxItems": 3, "items": {"type": "integer", "multipleOf": 7}}
    for seed in range(4):
        *answer, _ = draw(grammars.begin(json.dumps(schema)), tokenizer, random.Random(seed))
        assert [number % 7 for number in json.loads(tokenizer.decode(answer))] == [0, 0, 0]


def test_a_model_without_an_end_token_has_none(words: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no end token"):
        Grammars(words, tokenizer.vocab_size, ()).begin('{"type": "integer"}')


def test_more_schemas_than_are_kept(grammars: Grammars, tokenizer: Tokenizer) -> None:
    for _ in range(2):
        for number in range(40):
            grammar = grammars.begin(json.dumps({"const": number}))
            *answer, _ = draw(grammar, tokenizer, random.Random(0))
            assert tokenizer.decode(answer).strip() == str(number)
