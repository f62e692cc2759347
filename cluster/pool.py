"""Where a fleet's lives live: in processes of their own (`cluster.actor_pool`), or as guests (`cluster.lodging`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.resident import HostInfo


@dataclass(slots=True, eq=False)
class Process:
    """An expert actor, or a guest's seat in one; `pid` is known once a stand-by is warm."""

    name: str
    actor: Any  # `actor.METHOD.remote(...)` begins a method of `cluster.resident.Resident`, and can be awaited
    node: str | None = None  # where it was meant to start; None: where Ray likes
    pid: int | None = None


class Pool(Protocol):
    """Hands out processes for lives, and ends them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those that belong to this service; any other that asks ends itself."""

    @property
    def standby(self) -> list[int]:
        """Process ids of those that wait."""

    def take(self, threads: int) -> Process:
        """A process for a life, made for so many threads if it must be made."""

    def find(self, name: str) -> Process | None:
        """One that an earlier controller took; None when it is gone."""

    def end(self, process: Process) -> None:
        """End a process, and forget it."""

    async def insist(self, process: Process, info: HostInfo) -> None:
        """End a process for good whose life does not hear Ray."""

    def keep_standby(self, threads: Callable[[], int]) -> None:
        """See to it that a process waits for the next life; `threads` says what it is made for."""

    def stop(self) -> None:
        """End all that are left."""
