"""A doorbell between processes of one machine: sleep until somebody rings, at no cost meanwhile.

What another process writes here, and NIXL's notifications, are found by looking only, and a short sleep costs half a
core where timers are slow. So whoever sends also rings, and whoever waits sleeps in a futex on a page that both map. A
ring carries nothing: it is a hint to poll, may be lost or come for nothing. Words of the page say whether anybody
sleeps, which spares the call where nobody does, and on which core, so that who rings several bells can leave the one on
its own core, where it would have to make room, for the last. Native code (`kernels/csrc/lane.h`) rings and sleeps on
the same page.

A socket would do, but a wake-up through one tells the scheduler that its sender is about to sleep: the woken thread is
put on the sender's core, and a host that wakes there keeps the worker from sending to the next host.
"""

import ctypes
import mmap
import platform
import threading
from collections.abc import Callable

from experts.shared_memory import SharedMemory, map_shared
from kernels.native import native

SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
FUTEX_WAIT, FUTEX_WAKE = 0, 1
EVERYBODY = 0x7FFFFFFF
_LIBC = ctypes.CDLL(None, use_errno=True)


def current_core() -> int:
    """The core that runs this thread, just now."""
    return int(_LIBC.sched_getcpu())


class _Page:
    """One shared page: a word that every ring changes, whether anybody sleeps, on which core, and how many in C++."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._words = (ctypes.c_uint32 * 4).from_buffer(memory)  # which keeps it mapped
        self.address = ctypes.addressof(self._words)
        self._call = _LIBC.syscall
        self._number = SYS_FUTEX[platform.machine()]

    @property
    def rings(self) -> int:
        return int(self._words[0])

    @property
    def asleep(self) -> bool:
        return bool(self._words[1] or self._words[3])

    @asleep.setter
    def asleep(self, value: bool) -> None:
        self._words[1] = int(value)

    @property
    def core(self) -> int:
        return int(self._words[2])

    @core.setter
    def core(self, value: int) -> None:
        self._words[2] = value

    def ring(self) -> None:
        """Wake everybody who sleeps."""
        library = native()
        if library is not None:
            library.shoal_ring(self.address)
            return
        # two at once may write the same number, which differs from the one before all the same
        self._words[0] = (self._words[0] + 1) & 0xFFFFFFFF
        self._call(self._number, ctypes.c_void_p(self.address), FUTEX_WAKE, EVERYBODY, None, None, 0)

    def sleep(self, rings: int, timeout_s: float) -> None:
        """Until it rings, unless it did since there were so many `rings`."""
        seconds = int(timeout_s)
        limit = (ctypes.c_long * 2)(seconds, int((timeout_s - seconds) * 1e9))
        address = ctypes.c_void_p(self.address)
        self._call(self._number, address, FUTEX_WAIT, ctypes.c_uint32(rings), ctypes.byref(limit), None, 0)


class Bell:
    """The waiting end. `address` is for those who ring it. Linux only."""

    def __init__(self) -> None:
        self._shared = SharedMemory(mmap.PAGESIZE)
        self._page = _Page(self._shared.memory)
        self.address = self._shared.address
        self._attending = self._sleeping = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()

    @property
    def page(self) -> int:
        """Address of the page in this process, for native code; good for as long as somebody refers to the bell."""
        return self._page.address

    @property
    def rings(self) -> int:
        """How often it was rung."""
        return self._page.rings

    def ring(self) -> None:
        """Wake whoever waits here."""
        with self._lock:
            if not self._closed.is_set():
                self._page.ring()

    def wait(self, timeout_s: float, look: Callable[[], object]) -> None:
        """Sleep until it rings, or `timeout_s` seconds, unless `look` finds something.

        `look` is called once more after the world was told that somebody sleeps: what is sent before that comes
        without a ring. Several threads may wait; a ring wakes them all.
        """
        with self._lock:
            if self._closed.is_set():
                return
            self._sleeping += 1
            self._page.asleep = True
            self._page.core = current_core()
        try:
            rings = self._page.rings
            if not look():
                self._page.sleep(rings, timeout_s)
        finally:
            with self._lock:
                self._sleeping -= 1
                if not self._sleeping:
                    self._page.asleep = False

    def enter(self) -> None:
        """A thread begins to look for its message, among those of others."""
        with self._lock:
            self._attending += 1

    def leave(self) -> None:
        with self._lock:
            self._attending -= 1

    def ring_others(self) -> None:
        """What a thread found may be another's, which sleeps, or is about to."""
        if self._attending > 1:
            self.ring()

    def close(self) -> None:
        """Wake whoever waits, for the last time."""
        self.ring()
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._shared.close()


class Ringer:
    """Rings the bell of one process; one that is gone hears nothing. Raises ValueError for what is no address."""

    def __init__(self, address: str) -> None:
        memory = map_shared(address, mmap.PAGESIZE)
        self._page = None if memory is None else _Page(memory)  # where there is none, its owner wakes by its own clock

    @property
    def page(self) -> int | None:
        """Address of the bell's page in this process, for native code; good for as long as this is not closed."""
        return None if self._page is None else self._page.address

    def ring(self) -> None:
        if self._page is not None and self._page.asleep:
            self._page.ring()

    @property
    def core(self) -> int | None:
        """Where whoever sleeps there, or slept last, is likely to wake."""
        return self._page.core if self._page is not None else None

    def close(self) -> None:
        self._page = None
