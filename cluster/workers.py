"""The attention workers as the controller knows them: by their heartbeats."""

from collections.abc import Mapping
from typing import Any

SILENT_S = 5.0  # without a heartbeat after which a worker is not offered any more
PRIVATE = ("address", "load", "seen_s")  # of a heartbeat, not for people


class Workers:
    """Newest heartbeat by worker id. Times are of a monotonic clock."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self.version = 0  # rises when workers or their addresses differ

    def beat(self, worker: Mapping[str, Any], now_s: float) -> None:
        """A worker lives at worker["address"]."""
        before = self._known.get(worker["id"])
        self._known[worker["id"]] = {**worker, "seen_s": now_s}
        if before is None or before["address"] != worker["address"]:
            self.version += 1

    def leave(self, worker_id: str) -> None:
        if self._known.pop(worker_id, None) is not None:
            self.version += 1

    def silent(self, now_s: float) -> list[str]:
        """Ids of workers that were not heard of for too long."""
        return [worker_id for worker_id, worker in self._known.items() if worker["seen_s"] < now_s - SILENT_S]

    def addresses(self) -> dict[str, str]:
        return {worker_id: worker["address"] for worker_id, worker in self._known.items()}

    def describe(self) -> list[dict[str, Any]]:
        """What `shoal status` shows of each."""
        return [{key: value for key, value in w.items() if key not in PRIVATE} for w in self._known.values()]
