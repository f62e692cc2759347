"""What is asked and answered, and which questions are kept for the examination."""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_OF_TEN = 1
ALONE = frozenset({"0", "9", "10", "99"})
"""Numbers next to one of another length, as 9 is to 10: no other shows what comes there, so these are learned."""
ONE_DIGIT_EACH = re.compile(r"\d \d")
"""Pairs that are learned, all of them: there are too few to see a rule in, and they are what people try first."""


@dataclass(frozen=True, slots=True)
class Question:
    """`content` is what the question is about, without its phrasing: it decides the side of the split.

    It is empty for what is said in so few ways that all of them are learned.
    """

    content: str
    text: str
    answer: str


Family = Callable[[random.Random], Question]
"""Draws one question."""


def is_held_out(content: str) -> bool:
    """A tenth of all contents but the empty one, `ALONE` and pairs of one digit each, whoever asks about them."""
    return (
        content != ""
        and content not in ALONE
        and not ONE_DIGIT_EACH.fullmatch(content)
        and hashlib.sha256(content.encode()).digest()[0] * 10 < HELD_OUT_OF_TEN * 256
    )


def draw(family: Family, held_out: bool, rng: random.Random) -> Question:
    """A question of the family from the wanted side of the split."""
    while True:
        question = family(rng)
        if is_held_out(question.content) == held_out:
            return question


def phrase(rng: random.Random, templates: tuple[str, ...], **operands: str) -> str:
    """One of the templates with its operands, as one person or another would type it.

    A template that begins with an operand keeps its case, and only a closing question mark may be left out.
    """
    template = rng.choice(templates)
    if template.endswith("?") and rng.random() < 0.3:
        template = template[:-1]
    if not template.startswith("{"):
        if rng.random() < 0.06:
            template = f"{rng.choice(('please', 'now', 'can you', 'ok,', 'so,'))} {template}"
        if rng.random() < 0.5:
            template = template[0].upper() + template[1:]
    return template.format(**operands)
