"""A pairing by memory that both processes map: rows are written where they are read, and replies computed where they
are wanted. What stands in a slot is told by a line in front of the slots, written last.

The arithmetic's native library has the fences that this takes, and both ends of a dispatch in one call each
(`kernels/csrc/lane.cpp`), so without it there are no lanes.
"""

import ctypes
import platform
import sys
from collections.abc import Callable

from experts.arena import PAGE_BYTES, Arena
from experts.bell import SYS_FUTEX
from experts.lease import NOTE
from experts.pairing import Pairing, PairingFailed
from experts.shared_memory import SharedMemory, map_shared
from kernels.lane import MOST_SLOTS, Asked, NativeLane
from kernels.native import native


def lanes_serve() -> bool:
    """Whether this process can have lanes."""
    return sys.platform == "linux" and platform.machine() in SYS_FUTEX and native() is not None


class Lane(Pairing):
    """`memory` is for the peer to map, with slots of `slot_bytes`; `connect` maps the peer's."""

    near = True

    def __init__(self, slot_bytes: int, count: int) -> None:
        super().__init__()
        self._shared = SharedMemory(PAGE_BYTES + slot_bytes * count)
        self.incoming = Arena(slot_bytes, count, self._shared.memory, PAGE_BYTES)
        self.memory = self._shared.address
        self.native = NativeLane(
            in_lines=self.incoming.address - PAGE_BYTES,
            in_=self.incoming.address,
            in_slot_bytes=slot_bytes,
            slots=count,
        )
        self.address = ctypes.addressof(self.native)
        self._own_address = (ctypes.c_void_p * 1)(self.address)
        self._on_note: Callable[[bytes], None] | None = None

    def connect(
        self, peer: str, memory: str, slot_bytes: int, bell: str | None, on_note: Callable[[bytes], None]
    ) -> None:
        """Know the peer; raises PairingFailed when its memory cannot be mapped."""
        count = len(self.incoming.slots)
        try:
            pages = map_shared(memory, PAGE_BYTES + slot_bytes * count)
        except ValueError as error:
            raise PairingFailed(str(error)) from error
        if pages is None:
            raise PairingFailed(f"the memory of {peer} cannot be mapped here")
        self._hear(bell)
        if bell is not None and (self._ringer is None or self._ringer.page is None):
            raise PairingFailed(f"the bell of {peer} cannot be mapped here")
        self.outgoing = Arena(slot_bytes, count, pages, PAGE_BYTES)
        self.native.out_lines = self.outgoing.address - PAGE_BYTES
        self.native.out = self.outgoing.address
        self.native.out_slot_bytes = slot_bytes
        self.native.bell = self._ringer.page if self._ringer is not None else None
        self.peer = peer
        self._on_note = on_note

    def poll(self) -> int:
        library = native()
        assert library is not None
        told, on_note = (Asked * MOST_SLOTS)(), self._on_note  # threads may look at once, and one may close it
        found: int = library.shoal_news(self._own_address, 1, told, MOST_SLOTS)
        for asked in told[:found]:
            if on_note is not None and 0 <= asked.length < 1 << 32:
                on_note(NOTE.pack(asked.slot, asked.length, asked.correlation))
        return found

    def write(self, slot: int, length: int, correlation: int) -> None:
        library = native()
        assert library is not None
        library.shoal_announce(self.address, slot, length, correlation, 0)
        self._on_sent()

    def busy(self, slot: int) -> bool:
        return False

    def end(self) -> None:
        """Nothing will come any more; whoever waits in native code is to look up."""
        self.native.over = 1

    def close(self) -> None:
        """Memory stays mapped for as long as anybody refers to this, so that a late write harms nobody."""
        self.end()
        self._on_note = None  # which refers to whoever has this: nobody shall wait for a collection to free the memory
        self._shared.close()
