"""The attention workers as the controller knows them: by their heartbeats."""

import math
from collections.abc import Mapping
from typing import Any

from cluster.events import EventLog

SILENT_S = 5.0  # without a heartbeat after which a worker is not offered any more
LATE_S = 1.0  # between two looks; who looks later was not running, and has not heard what came meanwhile
SETTLED_S = 2.0  # with a worker after which a service is no longer starting: whoever waited for it has an answer
PRIVATE = ("address", "load", "since_s", "seen_s")  # of a heartbeat, not for people


class Workers:
    """Newest heartbeat by worker id. Times are of a monotonic clock.

    An earlier controller's workers are heard of one by one, and all of them only by `heard_s`.
    """

    def __init__(self, events: EventLog, heard_s: float = -math.inf) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._events = events
        self._heard_s = heard_s
        self._looked_s = -math.inf  # for silent ones
        self.version = 0  # rises when workers or their addresses differ

    def beat(self, worker: Mapping[str, Any], now_s: float) -> None:
        """A worker lives at worker["address"]; worker["ways"] has the way of its rows, by the id of each host asked."""
        worker_id = worker["id"]
        before = self._known.get(worker_id)
        self._known[worker_id] = {**worker, "since_s": before["since_s"] if before else now_s, "seen_s": now_s}
        if before is None or before["address"] != worker["address"]:
            self.version += 1
            self._events.record("worker_ready", now_s, worker=worker_id, node=worker["node"])
        resent = {name: worker[name] - (before or {}).get(name, 0) for name in ("rows_resent", "resends", "hedges")}
        if resent["rows_resent"] > 0 and before is not None:
            self._events.record("rows_resent", now_s, worker=worker_id, rows=resent.pop("rows_resent"), **resent)

    def leave(self, worker_id: str, reason: str, now_s: float) -> None:
        if self._known.pop(worker_id, None) is not None:
            self.version += 1
            self._events.record("worker_left", now_s, worker=worker_id, reason=reason)

    def silent(self, now_s: float) -> list[str]:
        """Ids of workers that were not heard of for too long while this controller could hear; look at every tick."""
        deaf_s = max(0.0, now_s - self._looked_s - LATE_S)
        self._looked_s = now_s
        for worker in self._known.values():
            worker["seen_s"] = min(now_s, worker["seen_s"] + deaf_s)
        return [worker_id for worker_id, worker in self._known.items() if worker["seen_s"] < now_s - SILENT_S]

    def differ(self, version: int, now_s: float) -> bool:
        """Whether whoever knows `version` should know better: who is not heard of yet may be living all the same."""
        return self.version != version and now_s >= self._heard_s

    @property
    def any(self) -> bool:
        return bool(self._known)

    def settled(self, now_s: float) -> bool:
        """Whether one has been here for a while: what can wait until the service answers need not wait any more."""
        return any(now_s - worker["since_s"] >= SETTLED_S for worker in self._known.values())

    def addresses(self) -> dict[str, str]:
        return {worker_id: worker["address"] for worker_id, worker in self._known.items()}

    def describe(self) -> list[dict[str, Any]]:
        """What `shoal status` shows of each."""
        return [{key: value for key, value in w.items() if key not in PRIVATE} for w in self._known.values()]
