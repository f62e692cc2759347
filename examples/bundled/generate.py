"""`python -m examples.bundled.generate DIR`: the data that the bundled model learns from, and its examination.

`train.jsonl`, `last.jsonl` and `heldout.jsonl` are the same bytes for the same seed and counts. What a held-out
question is about is in no training question.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from examples.bundled.conversations import Conversation, examination, last_lessons, training

CONVERSATIONS = 120_000
LAST = 80_000  # conversations of the last lessons
EXAMINED = 100  # of each family


def write_records(path: Path, conversations: Iterable[Conversation]) -> None:
    """One conversation a line, in the `messages` format."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, conversation in enumerate(conversations):
            file.write(json.dumps(conversation.record(number)) + "\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="examples.bundled.generate", description=__doc__)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS, metavar="N", help=str(CONVERSATIONS))
    parser.add_argument("--last", type=int, default=LAST, metavar="N", help=f"of the last lessons ({LAST})")
    parser.add_argument("--examined", type=int, default=EXAMINED, metavar="N", help=f"a family ({EXAMINED})")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_records(options.out / "train.jsonl", training(options.seed, options.conversations))
    write_records(options.out / "heldout.jsonl", examination(options.seed, options.examined))
    write_records(options.out / "last.jsonl", last_lessons(options.seed, options.last))
    print(f"wrote train.jsonl, last.jsonl and heldout.jsonl into {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
