"""Which host computes which expert of a layer, as the split of a dispatch reads it: one host index an expert."""

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from router.placement import Host, Placement

NOBODY = -1


class OwnerTables:
    """One placement's hosts by expert, int32, made once a layer; replicas take turns by layer."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._owner_E: dict[int, Tensor] = {}

    def owners(self, layer: int, failed: Container[Host] = ()) -> Tensor:
        """Index of the host for each expert, among holders that have not failed; NOBODY where all have."""
        if failed:
            return self._make(layer, failed)
        if layer not in self._owner_E:
            self._owner_E[layer] = self._make(layer, ())
        return self._owner_E[layer]

    def _make(self, layer: int, failed: Container[Host]) -> Tensor:
        hosts = self.placement.hosts
        chosen: list[int] = []
        for holders in self.placement.owners[layer]:
            able = [index for index in holders if hosts[index] not in failed]
            chosen.append(able[layer % len(able)] if able else NOBODY)
        return torch.tensor(chosen, dtype=torch.int32)


def hosts_left(before: Sequence[Host], after: Sequence[Host]) -> tuple[Host, ...]:
    """Host lives of an older table that a newer one no longer names."""
    return tuple(host for host in before if host not in after)
