"""Answers that have to fit a schema: alone, in company, preempted and continued they are the same, and they fit."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from attention.engine import Engine, EngineLimits
from attention.requests import GenerateRequest, SamplingParams
from attention.runner import EngineThread
from attention.scheduler import SchedulerLimits
from model import grammar
from model.checkpoint import Checkpoint
from model.grammar import Grammar, Grammars
from model.tokenizer import Tokenizer
from tests.serving import greedy, make_engine, run

SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["whale", "crab"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "says": {"type": "string", "maxLength": 12},
    },
    "required": ["animal", "legs", "says"],
    "additionalProperties": False,
}
PROMPT = (5, 6, 7)


def engine(words: Path, limits: EngineLimits | None = None) -> Engine:
    config = Checkpoint.open(words).config
    return make_engine(words, 2, limits, grammars=Grammars(words, config.vocab_size, config.eos_token_ids))


def asked(name: str, **params: object) -> GenerateRequest:
    given = {"max_tokens": 80, "temperature": 1.0, "json_schema": json.dumps(SCHEMA), **params}
    return GenerateRequest(name, PROMPT, SamplingParams(**given))  # type: ignore[arg-type]


def test_every_way_of_drawing_fits(words: Path) -> None:
    ways = [{"seed": seed} for seed in range(6)] + [
        {"temperature": 0.0},
        {"seed": 9, "top_p": 0.5},
        {"seed": 9, "top_k": 3},
        {"seed": 9, "min_p": 0.2, "presence_penalty": 1.0, "logit_bias": ((70, 50.0),)},
    ]
    answers = run(engine(words), [asked(str(number), **way) for number, way in enumerate(ways)])
    tokenizer, config = Tokenizer.load(words), Checkpoint.open(words).config
    texts = set()
    for answer in answers.values():
        assert answer.finish_reason == "stop"
        assert answer.tokens[-1] in config.eos_token_ids
        texts.add(tokenizer.decode(answer.tokens[:-1]))
    assert len(texts) > 5
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_company_and_a_small_cache_change_nothing(words: Path) -> None:
    limits = EngineLimits(cache_blocks=24, block_size=4, scheduler=SchedulerLimits(running=8))
    small = engine(words, limits)
    requests = [asked(str(seed), seed=seed) for seed in range(4)] + [greedy("plain", [9, 20, 30], 40)]
    crowded = run(small, requests)
    assert small.stats().preemptions > 0
    for request in requests:
        alone = run(engine(words), [request])[request.id]
        assert crowded[request.id].tokens == alone.tokens


def test_it_goes_on_where_an_earlier_life_stopped(words: Path) -> None:
    whole = run(engine(words), [asked("a", seed=5)])["a"].tokens
    for drawn in range(0, len(whole), 3):
        rest = run(engine(words), [replace(asked("a", seed=5), resumed_ids=tuple(whole[:drawn]))])["a"]
        assert rest.tokens == whole[drawn:]


def test_log_probabilities_are_the_models_own(words: Path) -> None:
    """As of every other token, whatever the request forbids."""
    answer = run(engine(words), [asked("a", seed=5, logprobs=3)])["a"]
    free = run(engine(words), [GenerateRequest("b", PROMPT, SamplingParams(max_tokens=1, seed=5, logprobs=3))])["b"]
    assert answer.logprobs[0].top == free.logprobs[0].top
    assert answer.tokens[0] != free.tokens[0]


def test_what_cannot_be_had_is_refused_and_the_others_go_on(words: Path) -> None:
    served = engine(words)
    for schema, said in (('{"type": "bogus"}', "Invalid type"), ("nonsense", "Expecting value")):
        with pytest.raises(ValueError, match=said):
            served.submit(asked("a", json_schema=schema))
    with pytest.raises(ValueError, match="cannot go on"):
        served.submit(replace(asked("a"), resumed_ids=PROMPT))
    assert run(served, [asked("a", seed=5)])["a"].finish_reason == "stop"


def test_the_engine_does_not_wait_while_a_schema_is_compiled(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    checked = grammar.check_schema

    def check(schema: str) -> None:
        compiled.append(threading.current_thread().name)
        checked(schema)

    monkeypatch.setattr(grammar, "check_schema", check)
    running = EngineThread(engine(words))
    ended = threading.Event()
    try:
        running.submit(asked("a", seed=5), lambda update: ended.set() if update.finish_reason == "stop" else None)
        assert ended.wait(60)
    finally:
        running.close()
    assert compiled == [threading.current_thread().name]


def test_without_a_tokenizer_it_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="json_schema is given; expected none"):
        make_engine(checkpoint("tiny")).submit(asked("a"))


@pytest.mark.parametrize("method", ["allowed", "take"])
def test_a_grammar_that_gives_up_ends_its_own_answer(words: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    genuine, calls = getattr(Grammar, method), []

    def give_up(grammar: Grammar, *given: object) -> object:
        calls.append(1)
        if len(calls) > 5:
            raise ValueError("too complex")
        return genuine(grammar, *given)

    monkeypatch.setattr(Grammar, method, give_up)
    answers = run(engine(words), [asked("a", seed=5), greedy("plain", [9, 20, 30], 40)])
    assert (answers["a"].finish_reason, answers["a"].error) == ("error", "too complex")
    assert len(answers["plain"].tokens) == 40
