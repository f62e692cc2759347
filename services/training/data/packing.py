"""Whole samples laid into rows. Positions begin anew with each sample, and no target lies in another sample.

Shapes: `T` tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attention.training.segments import IGNORED
from services.training.data.samples import Sample


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """Samples side by side: segment i is [segment_ends[i - 1], segment_ends[i]), and attention stays within it.

    token_T, target_T and position_T are int64. A target is the next token of the same segment where that is
    learned, else IGNORED. `samples` are the indices of the segments' samples.
    """

    token_T: NDArray[np.int64]
    target_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    segment_ends: tuple[int, ...]
    samples: tuple[int, ...]

    @property
    def targets(self) -> int:
        """Positions from which a token is learned."""
        return int(np.count_nonzero(self.target_T != IGNORED))


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the samples of each row: each, in order, goes to the first row with room for it.

    Raises ValueError for a length that is not within 1 to `capacity`. Takes time in n log n: `room` is a tree whose
    node has the most room that a row below it has, and whose leaves are the rows.
    """
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    rows: list[list[int]] = [[] for _ in lengths]
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"a sample of {length} tokens given; expected 1 to {capacity}, the row's length")
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        rows[node - leaves].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [row for row in rows if row]


def lay(samples: Sequence[Sample], indices: Sequence[int]) -> PackedRow:
    """One row of these samples, as long as they are together; `indices` are their numbers in the data set."""
    target_T = np.concatenate([_targets(sample) for sample in samples])
    return PackedRow(
        token_T=np.concatenate([sample.ids for sample in samples]).astype(np.int64),
        target_T=target_T,
        position_T=np.concatenate([np.arange(len(sample.ids), dtype=np.int64) for sample in samples]),
        segment_ends=tuple(int(end) for end in np.cumsum([len(sample.ids) for sample in samples])),
        samples=tuple(indices),
    )


def _targets(sample: Sample) -> NDArray[np.int64]:
    target_T = np.full(len(sample.ids), IGNORED, dtype=np.int64)
    target_T[:-1] = np.where(sample.mask[1:], sample.ids[1:], IGNORED)
    return target_T
