"""A change of who holds what, as a transaction: plan, prepare, commit, retire; or rolled back, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from router.holding import Holding, Pair


class ChangeRefused(ValueError):
    """A wish that cannot be begun; says why and what to do. Nothing was changed.

    `busy`: not now. It may be had later, when the change that is under way is over, or the service is ready.
    """

    def __init__(self, message: str, busy: bool = False) -> None:
        super().__init__(message, busy)
        self.busy = busy

    def __str__(self) -> str:
        return str(self.args[0])


class NotReady(ChangeRefused):
    """The service is not ready for any wish yet."""


def not_ready(reason: str | None) -> ChangeRefused:
    """For whoever asks before the service is ready; `reason` is why it never will be."""
    if reason is not None:
        return ChangeRefused(f"the service cannot start: {reason}")
    return NotReady("the service is not ready: ask again when it is", busy=True)


class Phase(StrEnum):
    """`PLAN` waits for joining hosts and decides who shall hold what; nothing is lost until `RETIRE`."""

    PLAN = "plan"
    PREPARE = "prepare"
    RETIRE = "retire"
    DONE = "done"
    ROLLED_BACK = "rolled_back"

    @property
    def over(self) -> bool:
        return self in (Phase.DONE, Phase.ROLLED_BACK)


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asked for. `None` leaves a thing as it is."""

    kind: str  # scale, drain, replicas, rebalance or follow
    hosts: int | None = None
    leaving: tuple[str, ...] = ()  # hosts that go first; of `follow`, exactly those that go, and others come for them
    replicas: int | None = None  # hosts that hold each expert, at least
    extra: int | None = None  # further replicas a layer, of its busiest experts
    why: str | None = field(default=None, compare=False)  # where nobody asked for it

    @classmethod
    def from_plain(cls, wish: Mapping[str, Any]) -> "Wish":
        """Inverse of `dataclasses.asdict`, whose `leaving` may be any sequence; raises TypeError on other names."""
        return cls(**{**wish, "leaving": tuple(wish.get("leaving") or ())})


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that each phase may take; a load has its time anew whenever another expert is there."""

    plan_s: float = 120.0  # joining hosts start
    prepare_s: float = 600.0  # experts load; also at the start of a life
    retire_s: float = 20.0  # workers move to the new table; those that have not are refused by the old holders


@dataclass(slots=True)
class Change:
    """One change, from the wish to its end."""

    id: str
    wish: Wish
    started_s: float
    deadline_s: float
    joining: dict[str, int]  # host id to generation
    leaving: tuple[str, ...]
    replicas: int
    extra: int
    phase: Phase = Phase.PLAN
    reason: str | None = None  # of a roll-back
    target: Holding | None = None
    epoch: int | None = None  # of the commit
    takers: frozenset[str] = frozenset()  # hosts that were asked to load
    loading: dict[str, frozenset[Pair]] = field(default_factory=dict)  # what each of them still loads
    progress: dict[str, int] = field(default_factory=dict)  # pairs loaded so far, by host
    pairs: int = 0  # copies that were to be loaded
    phase_since_s: float = 0.0
    phase_s: dict[str, float] = field(default_factory=dict)  # how long each phase took
    version: int = 1  # rises with everything that `describe` shows

    def enter(self, phase: Phase, now_s: float, deadline_s: float = 0.0) -> None:
        self.version += 1
        self.phase_s[self.phase.value] = round(now_s - self.phase_since_s, 6)
        self.phase, self.phase_since_s, self.deadline_s = phase, now_s, deadline_s

    def involves(self, host_id: str, generation: int) -> bool:
        """Whether the change cannot be committed without this very life."""
        return self.joining.get(host_id) == generation or host_id in self.takers

    def describe(self) -> dict[str, Any]:
        """What people and scripts are shown."""
        return {
            "id": self.id,
            "kind": self.wish.kind,
            "why": self.wish.why,
            "phase": self.phase.value,
            "over": self.phase.over,
            "reason": self.reason,
            "joining": sorted(self.joining),
            "leaving": list(self.leaving),
            "replicas": self.replicas,
            "extra": self.extra,
            "pairs": self.pairs,
            "pairs_loaded": self._loaded(),
            "epoch": self.epoch,
            "seconds": dict(self.phase_s),
            "version": self.version,
        }

    def _loaded(self) -> int:
        if self.target is None:
            return 0
        waiting = sum(len(pairs) for pairs in self.loading.values())
        return self.pairs - waiting + sum(min(self.progress.get(h, 0), len(p)) for h, p in self.loading.items())


def pairs_to_load(target: Holding, held: Mapping[str, frozenset[Pair]]) -> dict[str, frozenset[Pair]]:
    """What each host lacks for a target; hosts that lack nothing are left out."""
    lacking = {host_id: target.held_by(host_id) - pairs for host_id, pairs in held.items()}
    return {host_id: pairs for host_id, pairs in lacking.items() if pairs}
