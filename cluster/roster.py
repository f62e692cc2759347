"""The hosts as the controller knows them: which life each is in, what that life holds, when a dead one begins again.

A host is one of: `loading`, `ready`, `dead`, or `expected`: an earlier controller left it, and whether it lives is not
known yet. Times are seconds of a monotonic clock.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from router.holding import Pair
from router.placement import Host

QUICK_DEATH_S = 10.0  # a life shorter than this counts towards the back-off
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 10.0
START_ATTEMPTS = 3  # deaths while loading, before the service was ever ready, that are forgiven


@dataclass(frozen=True, slots=True)
class HostReport:
    """What a life says of itself once it serves."""

    host_id: str
    generation: int
    address: str
    held: frozenset[Pair]
    compute: float = 1.0  # relative speed, such as its number of threads
    max_pairs: int | None = None  # that its memory holds; None: no limit is known
    arithmetic: str = ""  # hosts of another may give other bits


@dataclass(frozen=True, slots=True)
class HostView:
    """One host as the controller sees it."""

    id: str
    generation: int  # of the life that is there, or was last
    state: str
    address: str = ""
    held: frozenset[Pair] = frozenset()
    dropping: frozenset[Pair] = frozenset()  # of these, what it was told to drop
    compute: float = 1.0
    max_pairs: int | None = None
    arithmetic: str = ""
    started_s: float = -math.inf
    died_at_s: float = -math.inf
    quick_deaths: int = 0  # lives in a row that were too short
    reason: str = ""  # why the last life ended

    @property
    def host(self) -> Host:
        return Host(self.id, self.generation, self.address)


def backoff_s(quick_deaths: int) -> float:
    """Wait before the next life: none after a long life, then doubling."""
    if quick_deaths <= 1:
        return 0.0
    return min(FIRST_BACKOFF_S * 2.0 ** (quick_deaths - 2), MAX_BACKOFF_S)


class Roster:
    """Views by host id, and the last generation of every id there ever was."""

    def __init__(self, generations: Mapping[str, int] | None = None) -> None:
        self.views: dict[str, HostView] = {}
        self.version = 0  # counts what happened
        self.generations: dict[str, int] = dict(generations or {})

    def __iter__(self) -> Iterator[HostView]:
        return iter(tuple(self.views.values()))

    def find(self, host_id: str, generation: int) -> HostView | None:
        """The view of this very life; None when the host is in another, or gone."""
        view = self.views.get(host_id)
        return view if view is not None and view.generation == generation else None

    def expect(self, host_id: str) -> None:
        """A host of an earlier controller: `ready` finds it, else its next life is due."""
        self._set(HostView(host_id, self.generations.get(host_id, 0), "expected"))

    def begin(self, host_id: str, now_s: float) -> HostView:
        """The next life of a host: its generation was never used before."""
        before = self.views.get(host_id)
        generation = self.generations.get(host_id, 0) + 1
        self.generations[host_id] = generation
        quick_deaths = before.quick_deaths if before is not None else 0
        view = HostView(host_id, generation, "loading", started_s=now_s, quick_deaths=quick_deaths)
        self._set(view)
        return view

    def ready(self, report: HostReport) -> bool:
        """A life serves; False when it is another than the one awaited, or was declared dead."""
        view = self.find(report.host_id, report.generation)
        if view is None or view.state not in ("loading", "expected"):
            return False
        self._set(
            replace(
                view,
                state="ready",
                address=report.address,
                held=report.held,
                compute=report.compute,
                max_pairs=report.max_pairs,
                arithmetic=report.arithmetic,
            )
        )
        return True

    def arithmetics(self) -> dict[str, list[str]]:
        """The hosts that serve, by how they compute."""
        found: dict[str, list[str]] = {}
        for view in self:
            if view.state == "ready":
                found.setdefault(view.arithmetic, []).append(view.id)
        return found

    def died(self, host_id: str, generation: int, reason: str, now_s: float) -> bool:
        """A life ended; False when that is known, or it was another."""
        view = self.find(host_id, generation)
        if view is None or view.state == "dead":
            return False
        quick = now_s - view.started_s < QUICK_DEATH_S
        deaths = view.quick_deaths + 1 if quick else 1
        self._set(
            replace(
                view,
                state="dead",
                held=frozenset(),
                dropping=frozenset(),
                address="",
                died_at_s=now_s,
                quick_deaths=deaths,
                reason=reason,
            )
        )
        return True

    def took(self, host_id: str, generation: int, pairs: frozenset[Pair]) -> None:
        """A life holds more."""
        view = self.find(host_id, generation)
        if view is not None and view.state == "ready":
            self._set(replace(view, held=view.held | pairs))

    def drops(self, host_id: str, generation: int, pairs: frozenset[Pair]) -> None:
        """A life was told to drop pairs, and may do so at any time."""
        view = self.find(host_id, generation)
        if view is not None and view.state == "ready":
            self._set(replace(view, dropping=pairs))

    def dropped(self, host_id: str, generation: int, pairs: frozenset[Pair]) -> None:
        """It has dropped them."""
        view = self.find(host_id, generation)
        if view is not None and view.state == "ready":
            self._set(replace(view, held=view.held - pairs, dropping=frozenset()))

    def remove(self, host_id: str) -> None:
        """The host left for good; its id may come back, in a later generation."""
        self.views.pop(host_id, None)
        self.version += 1

    def due(self, host_id: str, now_s: float) -> bool:
        """Whether a dead host's next life may begin."""
        view = self.views[host_id]
        return view.state in ("dead", "expected") and now_s >= view.died_at_s + backoff_s(view.quick_deaths)

    def _set(self, view: HostView) -> None:
        self.views[view.id] = view
        self.version += 1
