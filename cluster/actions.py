"""What the conductor wants done. Whoever carries these out reports back by its `host_...` and `load...` methods."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.saved import SavedState
from router.holding import Pair
from router.placement import Host, Placement


@dataclass(frozen=True, slots=True)
class Save:
    """Remember this across the controller's death, before anything that stands behind it."""

    state: SavedState


@dataclass(frozen=True, slots=True)
class StartHost:
    """Start a life and let it load these pairs; `host_ready`, `host_failed` or `host_died` follows."""

    host_id: str
    generation: int
    pairs: frozenset[Pair]


@dataclass(frozen=True, slots=True)
class Load:
    """A living host takes more pairs, from these replicas where one is named, else from disk.

    `loaded` or `load_failed` follows, unless the host dies.
    """

    change_id: str
    host_id: str
    generation: int
    pairs: frozenset[Pair]
    sources: Mapping[Pair, Host]


@dataclass(frozen=True, slots=True)
class Abandon:
    """What a change still loads at a host is no longer wanted."""

    change_id: str
    host_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Let every worker know this table."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class Retire:
    """A living host drops pairs that no table in use names; `retired` follows."""

    host_id: str
    generation: int
    pairs: frozenset[Pair]


@dataclass(frozen=True, slots=True)
class StopHost:
    """End a life that no table in use names, or that was declared dead: ask first, then insist."""

    host_id: str
    generation: int
    insist: bool = False  # at once: it does not answer


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask a life that somebody could not reach whether it is there; `probed` follows."""

    host_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The service cannot start; `reason` is for people."""

    reason: str


Action = Save | StartHost | Load | Abandon | Publish | Retire | StopHost | Probe | GiveUp
