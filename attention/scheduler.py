"""Continuous batching with chunked prefill: which tokens of which sequences the next step computes.

Plain Python over counts and block numbers. Running sequences come first, each with the tokens it has not computed
yet: those that are generating, with one, before those whose prompts are long. Then come waiting ones, in order of
arrival, while blocks and budget last. A part of each step is for short prompts that wait, so that one does not wait
until long ones are through, and a part is for a long one, so that it does not wait for as long as answers fill steps.
When blocks run out, the latest arrival gives its blocks up and is recomputed later: a request never fails
because others took the memory.
"""

import itertools
from collections import deque
from dataclasses import dataclass

from attention.blocks import NOTHING, BlockPool, Prefix
from attention.sequence import Sequence

SHORT_PART = 4  # a step's tokens over this: the longest short prompt, and what all of them get in a step
LONG_PART = 4  # a step's tokens over this: what the first long prompt gets of a step at least
LOOKED_AT = 16  # waiting sequences among which short ones are looked for


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step."""

    step_tokens: int = 512  # tokens computed in one step, over all sequences
    running: int = 64  # sequences that own blocks at once

    def __post_init__(self) -> None:
        if self.step_tokens < 1 or self.running < 1:
            raise ValueError(f"step_tokens {self.step_tokens} and running {self.running} must be at least 1")


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a sequence from `start` on, to be computed in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """True when this chunk reaches the last known token, so that the next one can be drawn."""
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """Holds the queues; `schedule` plans a step, `complete` records that it was computed."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self._pool = pool
        self._limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; the caller has checked that it fits the cache alone."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence and free its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; empty when there is nothing to do."""
        kept = self._kept_for_short()
        running = tuple(sorted(self._running, key=lambda sequence: sequence.arrival))  # as they may preempt
        counts, budget, kept = self._share_out(running, kept)
        preemptions = self.preemptions
        chunks: list[Chunk] = []
        for sequence, count in zip(running, counts, strict=True):
            if sequence not in self._running:  # preempted for an earlier one
                continue
            if count and self._grow(sequence, sequence.computed + count):
                chunks.append(Chunk(sequence, sequence.computed, count))
        if self.preemptions == preemptions:  # else what was just given up would be taken again, and given up
            self._admit(chunks, budget, kept)
        return chunks

    def _share_out(self, running: tuple[Sequence, ...], kept: int) -> tuple[list[int], int, int]:
        """Tokens of each running sequence in this step, answers and short prompts first; those that are left; and how
        many of these are still kept for short prompts that wait.
        """
        budget = self._limits.step_tokens
        part = max(1, budget // LONG_PART)
        counts = [0] * len(running)
        order = sorted(range(len(running)), key=lambda index: not self._short(running[index]))
        shorts = sum(map(self._short, running))
        left = budget - part if shorts < len(running) else budget
        for index in order[:shorts]:
            counts[index] = self._count(running[index], left, kept)
            left -= counts[index]
        budget -= sum(counts)
        kept = min(kept, max(0, budget - part))
        for index in order[shorts:]:
            counts[index] = self._count(running[index], budget, kept)
            budget -= counts[index]
        return counts, budget, kept

    def _admit(self, chunks: list[Chunk], budget: int, kept: int) -> None:
        """Let waiting sequences in, in order of arrival, but short ones past long ones for which too little is left."""
        for sequence in list(self._waiting):
            if not budget or len(self._running) >= self._limits.running:
                return
            self._reuse_prefix(sequence)
            count = self._count(sequence, budget, kept)
            if self._blocks_missing(sequence, len(sequence.tokens)) > self._pool.available:
                self._release(sequence)
                return
            if not count:
                self._release(sequence)
                continue
            self._waiting.remove(sequence)
            self._running.append(sequence)
            grown = self._grow(sequence, sequence.computed + count)
            assert grown
            if sequence.cached_tokens is None:
                sequence.cached_tokens = min(sequence.computed, sequence.prompt_length)
            chunks.append(Chunk(sequence, sequence.computed, count))
            budget -= count
            if self._short(sequence):
                kept = max(0, kept - count)

    def _count(self, sequence: Sequence, budget: int, kept: int) -> int:
        """Tokens of a sequence in a step that has `budget` left, `kept` of them for short prompts that wait."""
        rest = len(sequence.tokens) - sequence.computed
        return min(rest, budget if self._short(sequence) else max(0, budget - kept))

    def _short(self, sequence: Sequence) -> bool:
        """Whether what is to be computed of it is one token of an answer, or a short prompt's."""
        return self._is_short(len(sequence.tokens) - sequence.computed)

    def _is_short(self, tokens: int) -> bool:
        return tokens <= max(1, self._limits.step_tokens // SHORT_PART)

    def _kept_for_short(self) -> int:
        """Tokens of a step that short prompts among those that wait can use; cached beginnings count as computed."""
        part, wanted = self._limits.step_tokens // SHORT_PART, 0
        if len(self._running) >= self._limits.running:
            return 0
        size = self._pool.block_size
        for sequence in itertools.islice(self._waiting, LOOKED_AT):
            prefix = self._find_prefix(sequence)
            free = self._pool.available - self._pool.refresh(prefix)
            if -(-len(sequence.tokens) // size) - len(prefix.blocks) > free:
                break  # nobody is let in past it
            rest = len(sequence.tokens) - len(prefix.blocks) * size
            if self._is_short(rest):
                wanted += rest
        return min(wanted, part)

    def complete(self, chunks: list[Chunk]) -> None:
        """Latents of these chunks are in the cache: advance, and offer their full blocks to later requests."""
        size = self._pool.block_size
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.computed = chunk.end
            for index in range(len(sequence.contents), chunk.end // size):
                tokens = sequence.tokens[index * size : (index + 1) * size]
                content = self._pool.publish(sequence.blocks[index], sequence.last_content, tokens)
                sequence.contents.append(content)

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Start from blocks that already hold these tokens."""
        prefix = self._find_prefix(sequence)
        self._pool.take(prefix)
        sequence.blocks = list(prefix.blocks)
        sequence.contents = list(prefix.contents)
        sequence.computed = len(prefix.blocks) * self._pool.block_size

    def _find_prefix(self, sequence: Sequence) -> Prefix:
        """What the cache holds of a sequence's beginning; its last token is always computed, for its logits.

        A request for its prompt's log-probabilities computes the whole prompt.
        """
        if sequence.params.prompt_logprobs is not None and sequence.scored_prompt < sequence.prompt_length:
            return NOTHING
        sequence.found = self._pool.find(sequence.tokens, len(sequence.tokens) - 1, sequence.found)
        return sequence.found

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for `tokens` tokens, preempting later arrivals; False if it was preempted."""
        while (missing := self._blocks_missing(sequence, tokens)) > self._pool.available:
            victim = max(self._running, key=lambda candidate: candidate.arrival)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(self._pool.allocate() for _ in range(missing))
        return True

    def _blocks_missing(self, sequence: Sequence, tokens: int) -> int:
        return -(-tokens // self._pool.block_size) - len(sequence.blocks)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.contents = []
        sequence.computed = 0
