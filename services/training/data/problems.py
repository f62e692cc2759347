"""What is wrong with training data, named by file, line and field."""

from dataclasses import dataclass, field
from pathlib import Path

KEPT = 50  # problems that are remembered in words, unless more are asked for; the others are counted
SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault. `field` is a path within the record, such as `messages[2].role`; empty for the line as a whole."""

    path: Path
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.field}{': ' if self.field else ''}{self.message}"


@dataclass(slots=True)
class ProblemLog:
    """The first problems, of which at most `most` are kept, and how many there are."""

    most: int = KEPT
    first: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, problem: Problem) -> None:
        self.count += 1
        if len(self.first) < self.most:
            self.first.append(problem)


class DataError(ValueError):
    """The data cannot be trained on; says the first problem and how many there are."""

    def __init__(self, first: Problem, count: int, sequence_length: int) -> None:
        super().__init__(first, count, sequence_length)
        self.first = first
        self.count = count
        self.sequence_length = sequence_length

    def __str__(self) -> str:
        if self.count == 1:
            return str(self.first)
        look = f"`shoal data check FILE --model DIR --sequence-length {self.sequence_length}` lists them"
        return f"{self.first} (the first of {self.count} problems: {look})"


def shown(value: object) -> str:
    """A value for a message: as Python writes it, so that control characters stay visible, and cut."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
