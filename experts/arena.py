"""Memory that a peer writes into: page-aligned, cut into slots of one frame each, with its views made once."""

import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experts.frames import HEADER

PAGE_BYTES = mmap.PAGESIZE
SLOTS = 4
MAX_SLOTS = 16
MAX_ARENA_BYTES = 1 << 30  # of one client, one way: sizes come from the other side


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one frame. All views share its memory, and keep it mapped for as long as any of them lives."""

    address: int
    frame: memoryview  # the whole slot
    floats: npt.NDArray[np.float32]  # the payload: all behind the header
    ints: npt.NDArray[np.int32]  # the same bytes

    @property
    def payload_bytes(self) -> int:
        return len(self.frame) - HEADER.size


class Arena:
    """`count` slots of `slot_bytes`, side by side. Pages cost nothing until they are written."""

    def __init__(self, slot_bytes: int, count: int, pages: mmap.mmap | None = None, first: int = 0) -> None:
        """In `pages` from byte `first` on; without them, in memory of its own."""
        self.slot_bytes = slot_bytes
        self.nbytes = slot_bytes * count
        check_arena(slot_bytes, count)
        if pages is None:
            pages = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, np.uint8, self.nbytes, first)
        self.address: int = memory.ctypes.data
        self.slots = tuple(
            _slot(memory[first : first + slot_bytes], self.address + first)
            for first in range(0, self.nbytes, slot_bytes)
        )


def check_arena(slot_bytes: int, count: int) -> None:
    """Raises ValueError unless an arena of this shape is allowed."""
    if not 1 <= count <= MAX_SLOTS:
        raise ValueError(f"{count} slots asked for; expected 1 to {MAX_SLOTS}")
    if slot_bytes < PAGE_BYTES or slot_bytes % PAGE_BYTES:
        raise ValueError(f"slots of {slot_bytes} bytes asked for; expected a positive multiple of {PAGE_BYTES}")
    if slot_bytes * count > MAX_ARENA_BYTES:
        raise ValueError(
            f"{count} slots of {slot_bytes} bytes asked for; the cap of an arena is {MAX_ARENA_BYTES}: "
            "ask for less, and larger calls will go by gRPC"
        )


def slot_bytes(frame_bytes: int) -> int:
    """The smallest slot that holds a frame of this size, or the largest allowed when none does."""
    wanted = -(-max(frame_bytes, 1) // PAGE_BYTES) * PAGE_BYTES
    return min(wanted, MAX_ARENA_BYTES // SLOTS // PAGE_BYTES * PAGE_BYTES)


def _slot(memory: npt.NDArray[np.uint8], address: int) -> Slot:
    payload = memory[HEADER.size :]
    return Slot(address, memory.data, payload.view(np.float32), payload.view(np.int32))
