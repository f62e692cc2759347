"""The examination: questions with one right answer each, and how many of a family were answered so."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation up to a question, and the right answer."""

    family: str
    messages: tuple[Message, ...]
    answer: str

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Tally:
    """Of one family, or of all."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


@dataclass(frozen=True, slots=True)
class Wrong:
    """What was asked and what was answered."""

    asked: Asked
    answer: str


@dataclass(frozen=True, slots=True)
class Score:
    """By family, in the order of the questions."""

    families: dict[str, Tally]
    wrong: tuple[Wrong, ...]

    @property
    def overall(self) -> Tally:
        tallies = self.families.values()
        return Tally(sum(tally.right for tally in tallies), sum(tally.asked for tally in tallies))

    @property
    def least(self) -> float:
        """The share of the family that did worst."""
        return min(tally.share for tally in self.families.values())


def read_questions(path: Path) -> list[Asked]:
    """Records in the `messages` format whose last message is the answer; the family is the id up to its first dot.

    Raises ValueError naming the line of a record that is not so, and for a file without records.
    """
    asked = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            asked.append(_parse(line, f"{path}:{number}"))
    if not asked:
        raise ValueError(f"{path} holds no questions; expected one record a line, as examples.bundled.generate writes")
    return asked


def score(asked: Sequence[Asked], answers: Iterable[str]) -> Score:
    """Exact match, spaces around the answer aside; raises ValueError unless there is an answer to each question."""
    right: dict[str, list[bool]] = {}
    wrong = []
    for one, answer in zip(asked, answers, strict=True):
        matches = answer.strip() == one.answer
        right.setdefault(one.family, []).append(matches)
        if not matches:
            wrong.append(Wrong(one, answer))
    return Score({family: Tally(sum(each), len(each)) for family, each in right.items()}, tuple(wrong))


def _parse(line: str, where: str) -> Asked:
    try:
        record = json.loads(line)
        messages = [{"role": message["role"], "content": message["content"]} for message in record["messages"]]
        family = record.get("id", "all").split(".")[0]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: no record of messages with role and content ({error!r})") from error
    *before, last = messages or [{"role": "nobody", "content": ""}]
    if last["role"] != "assistant" or not before or before[-1]["role"] != "user":
        raise ValueError(f"{where}: expected a question of the user and the assistant's answer as the last messages")
    return Asked(family, tuple(before), last["content"].strip())
