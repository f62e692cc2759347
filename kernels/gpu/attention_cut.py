"""How attention is cut into programs. That is a matter of speed: a token's bits are the same in every cut.

`python -m bench.gpu_kernels` compares tiles and cuts, for speed and to the bit.
"""

from dataclasses import dataclass

import torch

MOST_PARTS = 1 << 26  # numbers, in fp32
SIDE_BY_SIDE = 256  # tokens of a step up to which splits are computed by programs of their own


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program has at a time: rows, each a head of a token; and keys, as many in all tiles of a device."""

    rows: int
    keys: int
    warps: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """Of a dtype and device."""

    few: Tile  # where programs have one token
    many: Tile


HOPPER = Tiles(Tile(16, 64, 4), Tile(64, 64, 8))  # both instructions give one row the same bits there, as tests look
ONE_KIND = Tiles(Tile(16, 32, 4), Tile(16, 32, 4))  # fits 99 KiB of shared memory
BLACKWELL = Tiles(Tile(64, 32, 8), Tile(64, 32, 8))  # whose instruction for 64 rows was not compared with another
WIDE = Tiles(Tile(16, 16, 4), Tile(16, 16, 4))  # for float32


def tiles_for(dtype: torch.dtype, capability: tuple[int, int] | None) -> Tiles:
    """For a device of a capability; None: as Hopper, or interpreted."""
    if dtype == torch.float32:
        return WIDE
    if capability is None or capability[0] == 9:
        return HOPPER
    return BLACKWELL if capability[0] in (10, 11) else ONE_KIND


@dataclass(frozen=True, slots=True)
class Cut:
    """How a step is cut into programs, which changes no bit.

    `apart`: each split has a program of its own; `together`: as many tokens share one as a tile has rows for.
    """

    apart: bool
    together: bool


def cut_for(tokens: int, sequences: int, parts: int) -> Cut:
    """For a step of so many tokens of so many sequences; a program walks each sequence that its tokens are of.

    `parts`: numbers that all splits of all tokens have, if they are apart.
    """
    return Cut(apart=tokens <= SIDE_BY_SIDE and parts <= MOST_PARTS, together=tokens >= 8 * sequences)
