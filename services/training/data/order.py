"""The order of the samples: a function of the seed and of how many were taken since the start."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

SEEDS = 2**64


class SampleOrder:
    """Each epoch is a permutation of all samples, drawn from (seed, epoch) alone.

    A cursor is the number of samples taken since the start of the run; nothing else is state. Only Philox's own
    numbers are used, which are the same in every version of numpy, unlike what is made of them there.
    """

    def __init__(self, seed: int, count: int) -> None:
        """Raises ValueError for a seed outside 64 bits, and for no samples."""
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed {seed} given; expected 0 to 2^64 - 1")
        if count < 1:
            raise ValueError(f"{count} samples given; expected at least one")
        self.seed = seed
        self.count = count
        self._kept: tuple[int, NDArray[np.int64]] | None = None  # the epoch asked for last

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """The samples in the epoch's order."""
        if self._kept is None or self._kept[0] != epoch:
            draws = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.count)
            self._kept = epoch, np.argsort(draws, kind="stable")
        return self._kept[1]

    def following(self, cursor: int) -> Iterator[int]:
        """Samples from the cursor on, from epoch to epoch, without end; raises ValueError for a negative cursor."""
        if cursor < 0:
            raise ValueError(f"cursor {cursor} given; expected the number of samples taken so far")
        epoch, place = divmod(cursor, self.count)
        while True:
            for index in self.permutation(epoch)[place:]:
                yield int(index)
            epoch, place = epoch + 1, 0
