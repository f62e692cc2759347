"""What an attention worker knows of the placement: a copy that a thread keeps new."""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from cluster.discovery import find_controller
from router.placement import Host, Placement

POLL_S = 10.0
RETRY_S = 0.2


class PlacementFollower:
    """A PlacementSource over the controller's long poll; survives the controller's death."""

    def __init__(self, namespace: str, token: str) -> None:
        """`token` is that of the controller whose tables are wanted."""
        self._namespace = namespace
        self._token = token
        self._placement: Placement | None = None
        self._taken = 0  # epoch of the last snapshot
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self.on_newer: Callable[[], None] | None = None  # called in the following thread
        self._thread = threading.Thread(target=self._follow, name="placement", daemon=True)
        self._thread.start()

    def snapshot(self) -> Placement:
        """The newest table; raises RuntimeError before the first one came (see `wait_first`)."""
        placement = self._placement
        if placement is None:
            raise RuntimeError("no placement was published yet: wait for the expert hosts first")
        self._taken = placement.epoch
        return placement

    def peek(self) -> Placement | None:
        """The newest table, which the caller does not use yet."""
        return self._placement

    def wait_after(self, epoch: int, timeout_s: float) -> Placement | None:
        """As `peek`, once there is a table newer than `epoch`, or after `timeout_s` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._placement is not None and self._placement.epoch > epoch, timeout_s)
        return self._placement

    def use(self, epoch: int) -> None:
        """The caller uses the table of this epoch from now on."""
        self._taken = epoch

    def names(self, host: Host) -> bool:
        return self._placement is not None and host in self._placement.hosts

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        self.wait_after(epoch, timeout_s)
        return self.snapshot()

    def wait_first(self, timeout_s: float) -> bool:
        """Wait for the first table; False when none came in `timeout_s` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._placement is not None, timeout_s)

    def epoch_in_use(self, idle: Callable[[], bool]) -> tuple[int, bool]:
        """No table older than this is used by the caller's engine, or will be; and whether that is the newest.

        A step keeps the table that it began with; `idle` says that none is under way.
        """
        newest = self._placement.epoch if self._placement is not None else 0
        used = newest if idle() else min(self._taken, newest)
        return used, used == newest

    def report(self, host: Host, reason: str) -> None:
        try:
            find_controller(self._namespace).report.remote(host.id, host.generation, reason, self._token)
        except ValueError:
            return  # the controller is being restarted, and will look for itself

    def close(self) -> None:
        self._closing.set()

    def _follow(self) -> None:
        while not self._closing.is_set():
            epoch = self._placement.epoch if self._placement else 0
            try:
                controller: Any = find_controller(self._namespace)
                text = ray.get(controller.watch.remote(self._token, epoch, POLL_S), timeout=POLL_S + 5)
            except (ValueError, RayActorError, GetTimeoutError):
                time.sleep(RETRY_S)
                continue
            if text is not None:
                with self._changed:
                    self._placement = Placement.from_json(text)
                    self._changed.notify_all()
                if self.on_newer is not None:
                    self.on_newer()
