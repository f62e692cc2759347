"""The model in this repository answers what it never saw: greedy, by our own engine, family by family."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from attention.requests import GenerateRequest, SamplingParams
from bench.local_worker import SwitchedPlacement
from examples.bundled.conversations import FAMILIES, Conversation, examination
from experts.client import ExpertClient
from experts.host import ExpertHost
from experts.local import LocalTransport
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from router.placement import Host, initial_placement

MODEL = Path(__file__).parents[2] / "models" / "bundled"
SEED, ASKED = 0, 100  # the examination in docs/training.md; so many of each family
AT_LEAST = 0.95
LONGEST = 128  # tokens of an answer


def answers(conversations: list[Conversation]) -> Iterator[str]:
    """What the model says to each."""
    checkpoint, tokenizer = Checkpoint.open(MODEL), Tokenizer.load(MODEL)
    source = SwitchedPlacement(initial_placement(checkpoint.config, [Host("host-0", 1, "local")]))
    host = ExpertHost(checkpoint.config, "host-0", 1)
    host.load(checkpoint, source.placement.held_by("host-0"))
    client = ExpertClient(LocalTransport({"host-0": host}), source)
    engine = Engine(Decoder(checkpoint, client, source), EngineLimits(cache_blocks=4096))
    for number, conversation in enumerate(conversations):
        messages = conversation.record(number)["messages"]
        assert isinstance(messages, list)
        prompt = tuple(tokenizer.apply_chat_template(messages[:-1]))
        engine.submit(GenerateRequest(str(number), prompt, SamplingParams(max_tokens=LONGEST, temperature=0.0)))
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(conversations))}
    while engine.has_work:
        for update in engine.step():
            tokens[update.id] += update.token_ids
    for number in range(len(conversations)):
        yield tokenizer.decode(tokens[str(number)]).strip()


@pytest.fixture(scope="module")
def right() -> dict[str, list[bool]]:
    """By family, whether each held-out question was answered to the letter."""
    asked = examination(SEED, ASKED)
    marks: dict[str, list[bool]] = {}
    for conversation, answer in zip(asked, answers(asked), strict=True):
        marks.setdefault(conversation.family, []).append(answer == conversation.questions[-1].answer)
    return marks


def test_held_out_questions_are_answered(right: dict[str, list[bool]]) -> None:
    marks = [mark for family in right.values() for mark in family]
    assert len(marks) == ASKED * len(FAMILIES)
    assert sum(marks) >= AT_LEAST * len(marks)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_left_behind(right: dict[str, list[bool]], family: str) -> None:
    assert sum(right[family]) >= AT_LEAST * len(right[family])
