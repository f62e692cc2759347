"""How a product is cut into programs. That is a matter of speed: a row's bits are the same in every tile.

Each output is one sum that rises along the inner dimension, sixteen numbers at a time, and all tiles of a dtype use one
instruction. On Hopper that is a warp group's, whose left side has 64 rows: where rows are few, the weight is that side.
`python -m bench.gpu_kernels` compares tiles, for speed and to the bit.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """Of one program: rows, outputs and inner numbers at a time; warps, and loads under way at once.

    `swapped`: the weight is the left side of the product, so that outputs fill the instruction's 64 rows and the rows
    its columns, of which it takes 8 or more.
    """

    rows: int
    outputs: int
    inner: int
    warps: int = 4
    stages: int = 3
    swapped: bool = False


FEW = Tile(16, 64, 128, 4, 4, swapped=True)
SOME = Tile(64, 64, 64, 4, 4)
MANY = Tile(128, 128, 64, 8, 3)
NARROW = (FEW, SOME, MANY)  # for dtypes of two bytes
CRAMPED = (Tile(16, 64, 64, 4, 4, swapped=True), SOME, MANY)  # the same, on devices of that kind
WIDE = Tile(16, 16, 64, 4, 3)  # for float32, which is multiplied number by number
CRAMPED_DEVICES = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Capabilities of devices whose programs have 99 KiB of shared memory, and no warp groups."""


def tile_for(rows: float, dtype: torch.dtype, capability: tuple[int, int] | None = None) -> Tile:
    """For so many rows of one weight, on average, on a device of a capability; None: as Hopper, or interpreted."""
    if dtype == torch.float32:
        return WIDE
    few, some, many = CRAMPED if capability in CRAMPED_DEVICES else NARROW
    if rows <= 2 * few.rows:
        return few
    return some if rows <= 4 * some.rows else many


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """None for the interpreter's, which is a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def blocks(count: int, size: int) -> int:
    """Parts of `size` that `count` fills, the last perhaps not wholly."""
    return -(-count // size)


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least `count`, and at least `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())
