"""What a training forward reads: samples laid flat, each attending to itself alone.

Shapes: `T` tokens of all rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who reads data only needs no torch
    from torch import Tensor

IGNORED = -100
"""A target that does not count; torch's cross entropy leaves it out."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows laid flat. `ends` are the samples' cumulative ends."""

    token_T: Tensor  # int64
    target_T: Tensor  # int64, the next token; IGNORED where it does not count
    position_T: Tensor  # int64
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        tokens = len(self.token_T)
        if len(self.target_T) != tokens or len(self.position_T) != tokens:
            raise ValueError(f"{tokens} tokens, {len(self.target_T)} targets, {len(self.position_T)} positions")
        if not self.ends or self.ends[-1] != tokens or min(self.lengths) < 1:
            raise ValueError(f"segment ends {self.ends[:8]} do not divide {tokens} tokens")

    @property
    def targets(self) -> int:
        """Tokens that count."""
        return int((self.target_T != IGNORED).sum())

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in itertools.pairwise((0, *self.ends)))
