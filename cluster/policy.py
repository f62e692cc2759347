"""What the controller decides, as pure functions of what it sees.

A host is one of: `loading`, `ready`, `dead`. Times are seconds of a monotonic clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.placement import Host, Owners, Placement

QUICK_DEATH_S = 30.0  # a life shorter than this counts towards the back-off
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 10.0
START_ATTEMPTS = 3  # deaths while loading, before the service was ever ready, that are forgiven


@dataclass(frozen=True, slots=True)
class HostView:
    """One host as the controller sees it."""

    id: str
    generation: int
    state: str
    address: str = ""
    died_at_s: float = 0.0
    quick_deaths: int = 0  # lives in a row that were too short


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the next life of a dead host now."""

    host_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The service cannot start; `reason` is for people."""

    reason: str


Decision = Restart | GiveUp


def decide(hosts: Sequence[HostView], ever_ready: bool, now_s: float) -> list[Decision]:
    """Restart dead hosts, each after its back-off; give up on a service that never came up."""
    decisions: list[Decision] = []
    for host in hosts:
        if host.state != "dead":
            continue
        if not ever_ready and host.quick_deaths >= START_ATTEMPTS:
            return [GiveUp(f"{host.id} died {host.quick_deaths} times while starting")]
        if now_s >= host.died_at_s + backoff_s(host.quick_deaths):
            decisions.append(Restart(host.id, host.generation + 1))
    return decisions


def backoff_s(quick_deaths: int) -> float:
    """Wait before the next life: none after a long life, then doubling."""
    if quick_deaths <= 1:
        return 0.0
    return min(FIRST_BACKOFF_S * 2.0 ** (quick_deaths - 2), MAX_BACKOFF_S)


def table(intended: Mapping[int, Owners], hosts: Sequence[HostView], epoch: int) -> Placement | None:
    """The table of the hosts that are ready, or None while some expert has no ready holder."""
    gone = {index for index, host in enumerate(hosts) if host.state != "ready"}
    owners = {
        layer: tuple(tuple(index for index in holders if index not in gone) for holders in experts)
        for layer, experts in intended.items()
    }
    if any(not holders for experts in owners.values() for holders in experts):
        return None
    return Placement(epoch, tuple(Host(host.id, host.generation, host.address) for host in hosts), owners)
