"""A run in words: where it is, what changed, and how it ended."""

from services.training.records import StepRecord
from services.training.running_mean import RunningMean
from services.training.tail import News

SPAN = 20  # steps that smoothed figures are over
NO_STEP = "no step made yet"


class RunView:
    """What is known of a run from its records, those of an earlier life included."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._went_back = 0
        self._hosts_lost = 0
        self._forget()

    @property
    def step(self) -> int:
        """Number of steps made."""
        return self._latest.step if self._latest is not None else 0

    def take(self, news: News) -> list[str]:
        """A line for each thing that changed, beside the figures."""
        said = []
        if news.back_to is not None:
            self._went_back += 1
            self._forget()
            for record in news.kept:
                self._add(record)
            said.append(f"went back to step {news.back_to}")
        for record in news.new:
            said += self._changes(record)
            self._hosts_lost += len(record.hosts_lost)
            self._add(record)
        return said

    def place(self) -> str:
        return f"step {self.step}/{self.total_steps}"

    def figures(self) -> str:
        """Of the newest step; loss, speed and time left are smoothed."""
        latest = self._latest
        if latest is None:
            return NO_STEP
        left = self.total_steps - latest.step
        parts = [
            f"loss {self._loss.value:.4f}",
            f"{self._tokens_per_s.value:,.0f} tokens/s",
            f"gradient norm {latest.grad_norm:.3g}",
            f"imbalance {latest.imbalance:.2f}",
            f"dropped {latest.dropped:.1%}",
        ]
        if left > 0:
            parts.append(f"{duration(left * self._seconds.value)} left")
        return "  ".join(parts)

    def summary(self, elapsed_s: float) -> str:
        """One line for the end."""
        if self._first is None:
            return f"{NO_STEP}, after {duration(elapsed_s)}"
        parts = [
            f"{self.place()} after {duration(elapsed_s)}: loss {self._loss.value:.4f}",
            f"{self._first.loss:.4f} at step {self._first.step}",
            f"{self._tokens:,} tokens",
        ]
        if self._hosts_lost:
            parts.append(f"{_count(self._hosts_lost, 'expert host')} lost")
        if self._went_back:
            parts.append(f"went back {_count(self._went_back, 'time')}")
        return ", ".join(parts)

    def _forget(self) -> None:
        self._first: StepRecord | None = None
        self._latest: StepRecord | None = None
        self._tokens = 0
        self._loss, self._tokens_per_s, self._seconds = RunningMean(SPAN), RunningMean(SPAN), RunningMean(SPAN)

    def _add(self, record: StepRecord) -> None:
        self._first = self._first or record
        self._latest = record
        self._tokens += record.tokens
        self._loss.add(record.loss)
        self._tokens_per_s.add(record.tokens_per_s)
        self._seconds.add(record.seconds)

    def _changes(self, record: StepRecord) -> list[str]:
        before = self._latest or record
        said = []
        if record.hosts_lost:
            said.append(f"lost {', '.join(record.hosts_lost)}, {_count(record.hosts, 'expert host')} left")
        elif record.hosts != before.hosts:
            said.append(f"{_count(record.hosts, 'expert host')}, before {before.hosts}")
        if record.workers != before.workers:
            said.append(f"{_count(record.workers, 'worker')}, before {before.workers}")
        return [f"step {record.step}: {each}" for each in said]


def duration(seconds: float) -> str:
    """In the one or two largest units that say something."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
