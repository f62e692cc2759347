"""From the arrival of tokens to two rates, the same way for every contender.

Prefill lasts from the start until every sequence has its first token. Decode lasts from then until every sequence
has `decode_tokens` more, so all sequences are generating during the whole of it; tokens that a continuous batcher
made earlier, while other prompts were still being computed, are not counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Prompts = tuple[tuple[int, ...], ...]
STAGGER_TOKENS = 64  # that a stream may have before the last request has even arrived


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of one length, computed as one batch, greedily and past any end token."""

    prompts: Prompts
    decode_tokens: int  # counted for each sequence, after its first

    @property
    def batch(self) -> int:
        return len(self.prompts)

    @property
    def most_tokens(self) -> int:
        """To ask of a continuous batcher: early sequences generate while the last prompts are computed."""
        return 1 + self.decode_tokens + self.batch + STAGGER_TOKENS


@dataclass(frozen=True, slots=True)
class Sample:
    """One workload, measured once."""

    prefill_tokens: int
    prefill_s: float
    decode_tokens: int  # over all sequences
    decode_s: float
    answers: Prompts  # the first tokens of each answer, in the order of the prompts

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s


class GenerationClock:
    """Told of every arrival, knows when the measurement is over. Sequences are named by their place."""

    def __init__(self, workload: Workload, started_s: float) -> None:
        self._workload = workload
        self._started_s = started_s
        self._answers: list[list[int]] = [[] for _ in workload.prompts]
        self._counted = [0] * workload.batch
        self._without_first = workload.batch
        self._without_last = workload.batch
        self._all_first_s: float | None = None
        self._ended_s: float | None = None

    @property
    def done(self) -> bool:
        return self._ended_s is not None

    def add(self, place: int, tokens: Iterable[int], now_s: float) -> None:
        """Tokens of one sequence have arrived."""
        if self.done:
            return
        for token in tokens:
            answer = self._answers[place]
            answer.append(token)
            if self._all_first_s is not None:
                self._count(place, now_s)
            elif len(answer) == 1:
                self._without_first -= 1
                if self._without_first == 0:
                    self._all_first_s = now_s

    def sample(self) -> Sample:
        """The measurement; raises ValueError before it is over."""
        if self._all_first_s is None or self._ended_s is None:
            raise ValueError("some sequence has too few tokens yet: the measurement is not over")
        workload = self._workload
        kept = 1 + workload.decode_tokens
        return Sample(
            prefill_tokens=sum(map(len, workload.prompts)),
            prefill_s=self._all_first_s - self._started_s,
            decode_tokens=workload.batch * workload.decode_tokens,
            decode_s=self._ended_s - self._all_first_s,
            answers=tuple(tuple(answer[:kept]) for answer in self._answers),
        )

    def _count(self, place: int, now_s: float) -> None:
        self._counted[place] += 1
        if self._counted[place] == self._workload.decode_tokens:
            self._without_last -= 1
            if self._without_last == 0:
                self._ended_s = now_s


def agreement(answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Share of sequences, 0 to 1, whose tokens are the same in both."""
    pairs = list(zip(answers, others, strict=True))
    return sum(tuple(a) == tuple(b) for a, b in pairs) / len(pairs)
