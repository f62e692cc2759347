"""Virtual time: callbacks in the order of their times, and waiting that runs them."""

import heapq
import itertools
from collections.abc import Callable


def never() -> bool:
    return False


class Clock:
    """Seconds from 0. Whoever waits runs what is due meanwhile, so waits nest, and an outer one ends after an inner."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self.now_s

    def after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call once, `delay_s` from now."""
        heapq.heappush(self._due, (self.now_s + max(0.0, delay_s), next(self._order), callback))

    def run_until(self, until_s: float, done: Callable[[], bool] = never) -> None:
        """Let time pass until then, or until `done`, which is looked at after every callback."""
        while not done():
            if not self._due or self._due[0][0] > until_s:
                self.now_s = max(self.now_s, until_s)
                return
            at_s, _, callback = heapq.heappop(self._due)
            self.now_s = max(self.now_s, at_s)
            callback()


class Violation(AssertionError):
    """Something that must never be is so."""
