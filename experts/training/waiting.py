"""Patience with a host that has not answered: slow is not dead, but frozen looks the same until somebody asks."""

import time
from collections.abc import Callable
from typing import Protocol

from experts.errors import HostUnavailable
from router.placement import Host

SUSPECT_S = 5.0  # after so long, and as often, the host's supervisor is asked to look


class Supervisor(Protocol):
    """Who knows which lives there are, and ends those that do not answer at all: their calls break then."""

    def names(self, host: Host) -> bool:
        """Whether the newest table has this life."""

    def report(self, host: Host, reason: str) -> None:
        """A host does not answer."""


class Waiting:
    """For one answer of one host."""

    def __init__(
        self,
        supervisor: Supervisor,
        host: Host,
        call: str,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._supervisor = supervisor
        self._host = host
        self._call = call
        self._clock = clock
        self._began_s = clock()
        self._deadline_s = deadline_s
        self._next_s = SUSPECT_S

    def still(self) -> None:
        """Nothing has come yet. Raises HostUnavailable past the deadline, and for a life that no table names."""
        waited_s = self._clock() - self._began_s
        reason = f"{self._call} was not answered in {waited_s:.0f} s"
        if waited_s >= self._deadline_s:
            raise HostUnavailable(f"{self._host.id}: {reason}")
        if not self._supervisor.names(self._host):
            raise HostUnavailable(f"{self._host.id}: {reason}, and a newer table does not name this life any more")
        if waited_s >= self._next_s:
            self._next_s = waited_s + SUSPECT_S
            self._supervisor.report(self._host, reason)
