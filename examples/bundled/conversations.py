"""Conversations of one question or several, of one side of the split."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from examples.bundled import beyond, numbers, talk, words
from examples.bundled.question import Family, Question, draw

LONGEST = 480  # characters; most tokens are one
TURNS = (1, 1, 1, 1, 1, 2, 2, 3, 4, 5)
FAMILIES: dict[str, Family] = numbers.FAMILIES | words.FAMILIES | talk.FAMILIES | beyond.FAMILIES
WEIGHTS = {
    "add": 14,
    "subtract": 18,
    "compare": 6,
    "sort-numbers": 8,
    "neighbour": 4,
    "parity": 2,
    "reverse": 12,
    "sort-letters": 10,
    "length": 4,
    "count": 8,
    "copy": 4,
    "place": 5,
    "case": 5,
    "greet": 3,
    "about": 4,
    "admit": 12,
}
"""How often each family is asked, out of 119: what is hard to learn more often."""
LAST_WEIGHTS = {
    "add": 20,
    "subtract": 44,
    "compare": 9,
    "sort-numbers": 10,
    "neighbour": 12,
    "parity": 1,
    "reverse": 4,
    "sort-letters": 6,
    "length": 6,
    "count": 16,
    "copy": 5,
    "place": 4,
    "case": 3,
    "greet": 3,
    "about": 5,
    "admit": 6,
}
"""The same for the last lessons, which dwell on what the model still gets wrong."""
LESSONS: dict[str, Family] = FAMILIES | {"neighbour": numbers.neighbour_of_many}
"""What is learned: of neighbours more than what is examined."""
SYSTEMS = ("You are a helpful assistant.", "You are Shoal.", "Be brief.", "Answer in one line.", "Be kind and helpful.")


@dataclass(frozen=True, slots=True)
class Conversation:
    """`family` is the last question's."""

    family: str
    system: str | None
    questions: tuple[Question, ...]

    def record(self, number: int) -> dict[str, object]:
        """As training data has it; the id begins with the family."""
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for question in self.questions:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": question.answer})
        return {"id": f"{self.family}.{number}", "messages": messages}


def converse(
    rng: random.Random,
    family: str,
    turns: int,
    held_out: bool,
    weights: Mapping[str, int] = WEIGHTS,
) -> Conversation:
    """So many questions, fewer where they would be too long; the last is of the family, those before of any."""
    families = FAMILIES if held_out else LESSONS
    system = rng.choice(SYSTEMS) if rng.random() < 0.04 else None
    last = draw(families[family], held_out, rng)
    questions = [last]
    left = LONGEST - _length(last) - len(system or "")
    while len(questions) < turns:
        question = draw(families[_any_family(rng, weights)], held_out, rng)
        left -= _length(question)
        if left < 0:
            break
        questions.insert(0, question)
    return Conversation(family, system, tuple(questions))


def training(seed: int, count: int) -> list[Conversation]:
    """Families by their weights."""
    return _conversations(random.Random(f"training {seed}"), count, WEIGHTS)


def last_lessons(seed: int, count: int) -> list[Conversation]:
    """Other conversations, families by the weights of the last lessons."""
    return _conversations(random.Random(f"last lessons {seed}"), count, LAST_WEIGHTS)


def examination(seed: int, count: int) -> list[Conversation]:
    """`count` of each family, no conversation twice; every fourth is the third question of a conversation.

    A family that has not so many held-out questions has as many as were found.
    """
    rng = random.Random(f"examination {seed}")
    found: list[Conversation] = []
    for family in FAMILIES:
        seen: set[tuple[str, int]] = set()
        for number in range(20 * count):
            if len(seen) == count:
                break
            turns = 3 if number % 4 == 3 else 1
            conversation = converse(rng, family, turns, held_out=True)
            key = conversation.questions[-1].text, turns
            if key not in seen:
                seen.add(key)
                found.append(conversation)
    return found


def _conversations(rng: random.Random, count: int, weights: Mapping[str, int]) -> list[Conversation]:
    return [converse(rng, _any_family(rng, weights), rng.choice(TURNS), False, weights) for _ in range(count)]


def _any_family(rng: random.Random, weights: Mapping[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _length(question: Question) -> int:
    return len(question.text) + len(question.answer) + len("User: \n\nAssistant: ")
