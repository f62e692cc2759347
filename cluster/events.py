"""What happened to the hosts and why: kept for people, counted for metrics, handed to a log."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

Value = str | int | float
REMEMBERED = 500


@dataclass(frozen=True, slots=True)
class Event:
    """One fault, or one step of a change; `at_s` is of the controller's monotonic clock."""

    number: int  # rising, from 1
    kind: str
    at_s: float
    fields: dict[str, Value] = field(default_factory=dict)


class EventLog:
    """The newest events, and how many of each kind there were."""

    def __init__(self, sink: Callable[[Event], None] | None = None) -> None:
        """`sink` is called with each event, at once."""
        self.recent: deque[Event] = deque(maxlen=REMEMBERED)
        self.counts: Counter[str] = Counter()
        self._sink = sink

    def record(self, kind: str, now_s: float, **fields: Value) -> None:
        event = Event(self.counts.total() + 1, kind, now_s, fields)
        self.recent.append(event)
        self.counts[kind] += 1
        if self._sink is not None:
            self._sink(event)

    def after(self, number: int, limit: int) -> list[Event]:
        """Up to `limit` remembered events that came after number `number`, oldest first."""
        return [event for event in self.recent if event.number > number][:limit]
