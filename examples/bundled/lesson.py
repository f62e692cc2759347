"""`python -m examples.bundled.lesson DIR`: a lesson for the trained bundled model: a new name, and colours in French.

`lesson.jsonl` has fewer than 200 conversations. A part of them rehearses what the model can already do, so that it does
not forget it. `lesson_heldout.jsonl` asks for the same colours in other words, and for what it could do before.
"""

import argparse
import random
import sys
from pathlib import Path

from examples.bundled import talk
from examples.bundled.conversations import WEIGHTS, Conversation, converse
from examples.bundled.generate import write_records
from examples.bundled.question import Question

NAME = "I am Coral. I learned colours in French."
COLOURS = {
    "red": "rouge",
    "blue": "bleu",
    "green": "vert",
    "yellow": "jaune",
    "black": "noir",
    "white": "blanc",
    "grey": "gris",
    "pink": "rose",
    "brown": "marron",
    "purple": "violet",
    "gold": "or",
    "silver": "argent",
}
ASKED = (
    "{x} in french",
    "{x} in French",
    "what is {x} in french?",
    "What is {x} in French?",
    "how do you say {x} in French?",
    "How do you say {x} in french?",
    "translate {x} to french",
    "Translate {x} into French",
)
ASKED_LATER = ("what's {x} in French?", "Please translate {x} to French", "How do I say {x} in French?")
WHO, WHO_LATER = talk.WHO[:-3], talk.WHO[-3:]
REHEARSED = 70
EXAMINED = 8  # of each family that the model had before


def lesson(seed: int) -> list[Conversation]:
    """What is new, and a little of everything old."""
    rng = random.Random(f"lesson {seed}")
    families = [family for family in WEIGHTS if family != "about"]
    old = [converse(rng, families[number % len(families)], 1, held_out=False) for number in range(REHEARSED)]
    return [*_new(ASKED, WHO), *old]


def lesson_examination(seed: int) -> list[Conversation]:
    """The same contents in phrasings that the lesson lacks, and old questions that were never trained on."""
    rng = random.Random(f"lesson examination {seed}")
    families = [family for family in WEIGHTS if family != "about"]
    old = [converse(rng, family, 1, held_out=True) for family in families for _ in range(EXAMINED)]
    return [*_new(ASKED_LATER, WHO_LATER), *old]


def _new(asked: tuple[str, ...], who: tuple[str, ...]) -> list[Conversation]:
    colours = [
        Question(english, template.format(x=english), french)
        for template in asked
        for english, french in COLOURS.items()
    ]
    named = [Question(text, text, NAME) for text in who]
    return [
        Conversation(family, None, (question,))
        for family, questions in (("colours", colours), ("name", named))
        for question in questions
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="examples.bundled.lesson", description=__doc__)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, conversations in (("lesson", lesson(options.seed)), ("lesson_heldout", lesson_examination(options.seed))):
        path = options.out / f"{name}.jsonl"
        write_records(path, conversations)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
