"""Which host computes which expert of a layer, as the split of a dispatch reads it: one host index an expert."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router.placement import Host, Placement

NOBODY = -1


class OwnerTables:
    """One placement's hosts by expert, int32, made once a layer and turn.

    Replicas take turns, by their rank: experts that the same hosts hold in the same order, such as a routing group, go
    to one host in a turn, so that replicas do not spread a token's rows over more hosts.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._owner_E: dict[tuple[int, int], Tensor] = {}
        self._sharers: dict[int, Sharers | None] = {}
        # after so many turns each expert's have come round, however many holders it has
        self._turns = {layer: math.lcm(*map(len, filter(None, owners))) for layer, owners in placement.owners.items()}

    def owners(self, layer: int, turn: int = 0, failed: Container[Host] = (), avoided: Container[Host] = ()) -> Tensor:
        """Index of the host for each expert, among holders that have not failed; NOBODY where all have.

        Holders that are `avoided` are asked only where there is no other.
        """
        if failed or avoided:
            return self._make(layer, turn, failed, avoided)
        key = (layer, turn % self._turns[layer])
        if key not in self._owner_E:
            self._owner_E[key] = self._make(*key, (), ())
        return self._owner_E[key]

    def sharers(self, layer: int, failed: Container[Host] = (), avoided: Container[Host] = ()) -> "Sharers | None":
        """All who may be asked for each expert, by the same rules; None where no expert has two."""
        if failed or avoided:
            return self._all(layer, failed, avoided)
        if layer not in self._sharers:
            self._sharers[layer] = self._all(layer, (), ())
        return self._sharers[layer]

    def _make(self, layer: int, turn: int, failed: Container[Host], avoided: Container[Host]) -> Tensor:
        chosen = [
            able[(layer + turn) % len(able)] if able else NOBODY
            for able in (self._able(holders, failed, avoided) for holders in self.placement.owners[layer])
        ]
        return torch.tensor(chosen, dtype=torch.int32)

    def _all(self, layer: int, failed: Container[Host], avoided: Container[Host]) -> "Sharers | None":
        able = [self._able(holders, failed, avoided) for holders in self.placement.owners[layer]]
        most = max(map(len, able), default=0)
        if most < 2:
            return None
        filled = [[*indexes, *[NOBODY] * (most - len(indexes))] for indexes in able]
        return Sharers(torch.tensor(filled, dtype=torch.int32), torch.tensor([len(indexes) for indexes in able]))

    def _able(self, holders: Sequence[int], failed: Container[Host], avoided: Container[Host]) -> list[int]:
        hosts = self.placement.hosts
        able = [index for index in holders if hosts[index] not in failed]
        return [index for index in able if hosts[index] not in avoided] or able


@dataclass(frozen=True, slots=True, eq=False)
class Sharers:
    """Hosts that may be asked for each expert: the first so many of a row, int32; and how many, int64."""

    holder_EC: Tensor
    holders_E: Tensor


def hosts_left(before: Sequence[Host], after: Sequence[Host]) -> tuple[Host, ...]:
    """Host lives of an older table that a newer one no longer names."""
    return tuple(host for host in before if host not in after)
