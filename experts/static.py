"""A placement that never changes: for one process, and for tests."""

import time
from dataclasses import dataclass

from router.placement import Host, Placement


@dataclass(frozen=True, slots=True)
class StaticPlacement:
    """A PlacementSource of one table."""

    placement: Placement

    def snapshot(self) -> Placement:
        return self.placement

    def names(self, host: Host) -> bool:
        return host in self.placement.hosts

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        time.sleep(timeout_s)  # nothing newer will come
        return self.placement

    def report(self, host: Host, reason: str) -> None:
        pass  # nobody supervises
