"""How many rows go to each expert, counted where they are routed."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor


class LoadMeter:
    """Rows routed to each expert of each MoE layer. One thread counts, another takes.

    Neither waits for the other: what has been counted only grows, number by number, and the taker, who never writes to
    it, tells by how much since it looked last.
    """

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._experts = experts
        self._counted_LE: npt.NDArray[np.int64] = np.zeros((len(layers), experts), np.int64)
        self._taken_LE = self._counted_LE.copy()

    def count(self, layer: int, experts_TK: Tensor) -> None:
        """Add a step's choices, integers [T, K] of a host or a device; raises KeyError for a layer without experts."""
        # numpy's calls cost a few microseconds, torch's as many dozens: a layer of a small step has none to spare
        counts_E = np.bincount(experts_TK.numpy(force=True).reshape(-1), minlength=self._experts)
        self._counted_LE[self._row[layer]] += counts_E

    def counts_at(self, layer: int) -> int:
        """Address of a layer's counts, int64 [experts], to which whoever counts may add in native code."""
        return int(self._counted_LE[self._row[layer]].ctypes.data)

    def take(self) -> dict[int, list[int]]:
        """Rows of each expert, by layer, since the last take; nothing is lost, and nothing told twice."""
        seen_LE = self._counted_LE.copy()
        new_LE = seen_LE - self._taken_LE
        self._taken_LE = seen_LE
        return {layer: new_LE[row].tolist() for layer, row in self._row.items()}
