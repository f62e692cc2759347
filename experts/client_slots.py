"""A client's bookkeeping of the slots of one lease: which are free, whose call each carries, which replies came."""

import collections
import contextlib
import itertools
import threading

FREE, WAITING, ABANDONED = 0, -1, -2  # else the length of the reply that came


class SlotTable:
    """Slots are taken, answered and freed, by any thread. The last one freed is taken first: it is still in a cache.

    A slot whose caller gave up is not free before its late reply came: the host may be writing to it.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = list(range(count))
        self._state = [FREE] * count
        self._correlation = [0] * count
        self._correlations = itertools.count(1)
        # slots whose caller was collected as garbage, which may happen anywhere: under this lock, for one
        self._dropped: collections.deque[int] = collections.deque()

    def take(self) -> tuple[int, int] | None:
        """A free slot and the id of its call, or None when all are in use."""
        while self._dropped:
            with contextlib.suppress(IndexError):  # another thread took the last
                self.abandon(self._dropped.popleft())
        with self._lock:
            if not self._free:
                return None
            slot = self._free.pop()
            correlation = self._correlation[slot] = next(self._correlations)
            self._state[slot] = WAITING
            return slot, correlation

    def answer(self, slot: int, length: int, correlation: int) -> bool:
        """A reply came; False when nobody waits for it."""
        with self._lock:
            if not 0 <= slot < len(self._state) or self._correlation[slot] != correlation or length <= 0:
                return False
            if self._state[slot] == WAITING:
                self._state[slot] = length
                return True
            if self._state[slot] == ABANDONED:
                self._let_go(slot)
            return False

    def length(self, slot: int) -> int:
        """Bytes of the reply that came; not above 0 while there is none."""
        return self._state[slot]

    def release(self, slot: int) -> None:
        """The reply was read, or nothing was sent."""
        with self._lock:
            self._let_go(slot)

    def abandon(self, slot: int) -> None:
        """Nobody waits any more: free when the reply is there, else when it comes."""
        with self._lock:
            if self._state[slot] > 0:
                self._let_go(slot)
            else:
                self._state[slot] = ABANDONED

    def drop(self, slot: int) -> None:
        """Abandon soon; safe in a finaliser."""
        self._dropped.append(slot)

    @property
    def late(self) -> bool:
        """Whether some slot waits for a reply that nobody does."""
        return bool(self._dropped) or ABANDONED in self._state

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def taken(self) -> int:
        return len(self._state) - len(self._free)

    def _let_go(self, slot: int) -> None:
        self._state[slot] = FREE
        self._free.append(slot)
