"""What is kept of each training step: one JSON object, on one line of metrics.jsonl."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

METRICS = "metrics.jsonl"
"""Name of the file, in the run's output directory."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step of all workers together.

    Raises ValueError naming the field that is no finite number, no count, or of another type.
    """

    step: int  # number of steps made, this one included
    loss: float  # mean cross entropy over the targets, nats
    balance: float  # balance losses, coefficients included
    lr: float
    tokens: int
    targets: int
    grad_norm: float  # before clipping
    dropped: float  # share of the slots
    tokens_per_s: float
    seconds: float
    epoch: float  # how often the data were gone through
    imbalance: float  # largest load of an expert over the mean one, mean over the layers
    hosts_lost: tuple[str, ...]
    workers: int
    hosts: int  # of experts

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                _expect(field.name, value, _is_count(value), "a whole number of at least 0")
            elif field.type is float:
                _expect(field.name, value, _is_finite(value), "a finite number")
            else:
                sound = isinstance(value, tuple) and all(isinstance(host, str) for host in value)
                _expect(field.name, value, sound, "a tuple of host ids")
        _expect("step", self.step, self.step > 0, "the number of steps made, 1 or more")

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> "StepRecord":
        """Raises ValueError when it is no record."""
        document: Any = json.loads(line)
        names = {field.name for field in fields(cls)}
        if not isinstance(document, dict) or set(document) != names:
            raise ValueError(f"{document!r:.200} is no step's record; expected an object with {', '.join(names)}")
        hosts_lost = document["hosts_lost"]
        return cls(**document | {"hosts_lost": tuple(hosts_lost) if isinstance(hosts_lost, list) else hosts_lost})


def _expect(name: str, value: object, sound: bool, expected: str) -> None:
    if not sound:
        raise ValueError(f"{name} of a training step is {value!r}; expected {expected}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= 2**53  # as a float it is the same number
    return isinstance(value, float) and math.isfinite(value)
