"""Lives that another controller keeps in an expert host's process, beside its own."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

from cluster.spec import ServiceSpec

MAX_GUESTS = 8
CALLS = 3 * MAX_GUESTS  # at once of all guests, each of which has one that waits for its end
METHODS = frozenset(
    ("begin", "settle", "take", "taken", "abandon", "drop", "share", "ping", "progress", "wait_for_end", "stop")
)


class Guest(Protocol):
    """What `METHODS` names, and:"""

    def leave(self) -> None:
        """Let whoever waits for its end know that it is over."""

    def end(self) -> None:
        """Stop, and give all memory back; more than once is fine."""


MakeGuest = Callable[[ServiceSpec, str, str], Guest]  # spec, name, token
WaitUntilUnwanted = Callable[[str, str, threading.Event], None]  # see `cluster.resident.wait_until_unwanted`


class Guests:
    """By name. Methods may be called from several threads."""

    def __init__(self, make: MakeGuest, wait_until_unwanted: WaitUntilUnwanted) -> None:
        self._make = make
        self._wait_until_unwanted = wait_until_unwanted
        self._here: dict[str, tuple[Guest, threading.Event]] = {}
        self._closed = False
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._here)

    def admit(self, spec: ServiceSpec, name: str, token: str) -> bool:
        """Take one in, for as long as its controller wants it; False where there is no room, or the process ends."""
        with self._lock:
            if self._closed or len(self._here) >= MAX_GUESTS:
                return False
            over = threading.Event()
            self._here[name] = self._make(spec, name, token), over
        threading.Thread(target=self._keep, args=(spec.namespace, name, over), name="guest", daemon=True).start()
        return True

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """A method of a guest, one of `METHODS`; raises KeyError where it is not here, and what the method raises."""
        if method not in METHODS:
            raise ValueError(f"{method!r} is no method of a guest; expected one of {', '.join(sorted(METHODS))}")
        entry = self._here.get(name)
        if entry is not None:
            return getattr(entry[0], method)(*arguments)
        if method in ("wait_for_end", "stop"):
            return None  # it has ended
        raise KeyError(f"there is no guest {name} here")

    def evict(self, name: str) -> None:
        """End a guest and free its memory; one that is not here is fine."""
        with self._lock:
            entry = self._here.pop(name, None)
        if entry is not None:
            guest, over = entry
            over.set()
            guest.leave()
            guest.end()

    def leave(self) -> None:
        """The process ends: whoever waits for a guest's end learns of it now, and nobody else comes in."""
        with self._lock:
            self._closed = True
            guests = [guest for guest, _ in self._here.values()]
        for guest in guests:
            guest.leave()

    def _keep(self, namespace: str, name: str, over: threading.Event) -> None:
        self._wait_until_unwanted(namespace, name, over)
        self.evict(name)
