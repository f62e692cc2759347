"""One life of one expert host as a Ray actor. Ray starts it and watches it; rows come past it.

Its process may have guests: lives of other controllers, such as a training run's, with doors and experts of their own.
"""

import os
import threading
from dataclasses import replace
from typing import Any

from cluster.guests import Guests
from cluster.imports import kept_objects
from cluster.resident import Resident, wait_until_unwanted
from cluster.spec import ServiceSpec
from cluster.threads import settle_threads

GUESTS = "guests"  # Ray's name for the threads that guests' calls run on, so that they take none from the host's own


class GuestResident(Resident):
    """A life that leaves its process as it found it."""

    def leave(self) -> None:
        """Let whoever waits for its end know that it is over."""
        self._ended.set()

    def end(self) -> None:
        """Stop, and give all memory back; more than once is fine."""
        self._life.end()


class ExpertActor(Resident):
    """Threaded actor: a life that has the process for itself, but for its guests."""

    def __init__(self, spec: ServiceSpec, name: str, token: str, threads: int) -> None:
        settle_threads(threads)
        with kept_objects():
            super().__init__(spec, name, token, threads)
        self._spec = spec
        self._name = name
        self._threads = threads
        self._guests = Guests(self._make_guest, wait_until_unwanted)
        threading.Thread(target=self._follow_controller, name="orphan-check", daemon=True).start()

    def admit(self, spec: ServiceSpec, name: str, token: str) -> bool:
        """Take a host of another controller in; False where there is no room."""
        return self._guests.admit(spec, name, token)

    def guest(self, name: str, method: str, *arguments: Any) -> Any:
        """A method of a guest: see `Guests.call`."""
        return self._guests.call(name, method, *arguments)

    def guests(self) -> tuple[str, ...]:
        """Names of those that are here."""
        return self._guests.names

    def evict(self, name: str) -> None:
        """End a guest and free its memory; one that is not here is fine."""
        self._guests.evict(name)

    def stop(self) -> None:
        """Close the door, letting requests in flight finish. Guests are told at once: this process has not long."""
        self._guests.leave()
        super().stop()

    def _make_guest(self, spec: ServiceSpec, name: str, token: str) -> GuestResident:
        here = replace(spec, gpus=self._spec.gpus)  # it computes on what this process was given
        return GuestResident(here, name, token, self._threads)

    def _follow_controller(self) -> None:
        """End this process when nobody is left to serve, or when the controller does not know it any more."""
        wait_until_unwanted(self._spec.namespace, self._name, threading.Event())
        os._exit(0)
