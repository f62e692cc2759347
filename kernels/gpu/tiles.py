"""How a product is cut into programs. That is a matter of speed: a row's bits are the same in every tile.

Each output is one sum that rises along the inner dimension, sixteen numbers at a time, and all tiles of a dtype use one
instruction. On Hopper that is a warp group's, which has 64 rows or more, so no tile has fewer, though rows be few: what
is not there is not read, and such products wait for memory anyway.
"""

from dataclasses import dataclass

import torch

FEW_ROWS = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """Of one program: rows, outputs and inner numbers at a time; warps, and loads under way at once."""

    rows: int
    outputs: int
    inner: int
    warps: int = 4
    stages: int = 3


FEW = Tile(64, 32, 128, 4, 4)
SOME = Tile(64, 64, 64, 4, 4)
MANY = Tile(128, 128, 64, 8, 3)
NARROW = (FEW, SOME, MANY)  # for dtypes of two bytes
WIDE = Tile(16, 32, 32, 4, 2)  # for float32, which is multiplied number by number


def tile_for(rows: float, dtype: torch.dtype) -> Tile:
    """For so many rows of one weight, on average."""
    if dtype == torch.float32:
        return WIDE
    if rows <= FEW_ROWS:
        return FEW
    return SOME if rows <= SOME.rows else MANY


def blocks(count: int, size: int) -> int:
    """Parts of `size` that `count` fills, the last perhaps not wholly."""
    return -(-count // size)


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least `count`, and at least `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())
