"""The hosts that take part in one training step: the table that it began with, and who failed since."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experts.dispatch_plan import OwnerTables
from experts.errors import ExpertError
from router.placement import Host, Placement


class StepLost(ExpertError):
    """An expert has no holder left that was there when the step began: the step must be begun again, or rolled back."""


class StepPlacement:
    """The table of one step, for all of it: a life that joins meanwhile has not seen the step's gradients.

    `names` says whether a life is still there, `report` tells its supervisor about one that does not answer.
    """

    def __init__(self, names: Callable[[Host], bool], report: Callable[[Host, str], None]) -> None:
        self._placement: Placement | None = None
        self._names = names
        self._report = report

    def use(self, placement: Placement) -> None:
        self._placement = placement

    def snapshot(self) -> Placement:
        if self._placement is None:
            raise RuntimeError("no step was begun")
        return self._placement

    def names(self, host: Host) -> bool:
        return self._names(host)

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        """The same table, for another try; raises StepLost once a life of it is gone."""
        placement = self.snapshot()
        gone = [host.id for host in placement.hosts if not self._names(host)]
        if gone:
            raise StepLost(f"{', '.join(gone)} went during the step, and held experts that no other does")
        time.sleep(timeout_s)
        return placement

    def report(self, host: Host, reason: str) -> None:
        self._report(host, reason)


@dataclass(frozen=True, slots=True)
class StepHosts:
    """Who takes part in a step. `failed` grows: who failed once is not asked again in this step."""

    step: int
    placement: Placement
    tables: OwnerTables
    failed: dict[Host, str] = field(default_factory=dict)
    _held: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)

    def alive(self) -> list[Host]:
        return [host for host in self.placement.hosts if host not in self.failed]

    def held(self, layer: int) -> list[Tensor]:
        """Of each host, the layer's experts that it holds: bool [E]; made once a step."""
        if layer not in self._held:
            owners = self.placement.owners[layer]
            self._held[layer] = [
                torch.tensor([index in holders for holders in owners]) for index in range(len(self.placement.hosts))
            ]
        return self._held[layer]
