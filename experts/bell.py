"""A doorbell between processes of one machine: sleep until somebody rings, at no cost meanwhile.

NIXL's notifications are found by polling only, and a short sleep costs half a core where timers are slow. So whoever
sends also rings, and whoever waits sleeps in a futex on a page that both map. A ring carries nothing: it is a hint to
poll, may be lost or come for nothing. A word of the page says whether anybody sleeps, which spares the call where
nobody does; another on which core, so that who rings several bells can leave the one on its own core, where it would
have to make room, for the last.

A socket would do, but a wake-up through one tells the scheduler that its sender is about to sleep: the woken thread is
put on the sender's core, and a host that wakes there keeps the worker from sending to the next host.
"""

import contextlib
import ctypes
import mmap
import os
import platform
import re
import secrets
import threading
from collections.abc import Callable

ADDRESS = re.compile(r"(shoal-[0-9a-f]{32})/([0-9]{1,10})/([0-9]{1,10})")
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
FUTEX_WAIT, FUTEX_WAKE = 0, 1
EVERYBODY = 0x7FFFFFFF
_LIBC = ctypes.CDLL(None, use_errno=True)


def current_core() -> int:
    """The core that runs this thread, just now."""
    return int(_LIBC.sched_getcpu())


class _Page:
    """One shared page: a word that every ring changes, whether anybody sleeps, and on which core."""

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, mmap.PAGESIZE)
        self._words = (ctypes.c_uint32 * 3).from_buffer(self._memory)
        self._address = ctypes.addressof(self._words)
        self._call = _LIBC.syscall
        self._number = SYS_FUTEX[platform.machine()]

    @property
    def rings(self) -> int:
        return int(self._words[0])

    @property
    def asleep(self) -> bool:
        return bool(self._words[1])

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
        # two at once may write the same number, which differs from the one before all the same
        self._words[0] = (self._words[0] + 1) & 0xFFFFFFFF
        self._call(self._number, ctypes.c_void_p(self._address), FUTEX_WAKE, EVERYBODY, None, None, 0)

    def sleep(self, rings: int, timeout_s: float) -> None:
        """Until it rings, unless it did since there were so many `rings`."""
        seconds = int(timeout_s)
        limit = (ctypes.c_long * 2)(seconds, int((timeout_s - seconds) * 1e9))
        address = ctypes.c_void_p(self._address)
        self._call(self._number, address, FUTEX_WAIT, ctypes.c_uint32(rings), ctypes.byref(limit), None, 0)

    def close(self) -> None:
        del self._words
        self._memory.close()


class Bell:
    """The waiting end. `address` is for those who ring it. Linux only."""

    def __init__(self) -> None:
        name = f"shoal-{secrets.token_hex(16)}"
        # an open file without a place: it is gone with this process, however that ends
        self._file = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self._file, mmap.PAGESIZE)
        self._page = _Page(self._file)
        self.address = f"{name}/{os.getpid()}/{self._file}"
        self._attending = self._sleeping = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()

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
                    if self._closed.is_set():
                        self._page.close()

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
            os.close(self._file)
            if not self._sleeping:
                self._page.close()


class Ringer:
    """Rings the bell of one process; one that is gone hears nothing. Raises ValueError for what is no address."""

    def __init__(self, address: str) -> None:
        parts = ADDRESS.fullmatch(address)
        if parts is None:
            raise ValueError(f"{address!r} is no bell's address")
        self._page = _open_page(*parts.groups())

    def ring(self) -> None:
        if self._page is not None and self._page.asleep:
            self._page.ring()

    @property
    def core(self) -> int | None:
        """Where whoever sleeps there, or slept last, is likely to wake."""
        return self._page.core if self._page is not None else None

    def close(self) -> None:
        if self._page is not None:
            self._page.close()
            self._page = None


def _open_page(name: str, process: str, file: str) -> _Page | None:
    """The page of another process's bell; None where it cannot be reached, and its owner wakes by its own clock.

    Only a file of that very name is opened: we write to it.
    """
    path = f"/proc/{process}/fd/{file}"
    with contextlib.suppress(OSError, ValueError):
        if os.readlink(path) != f"/memfd:{name} (deleted)":
            return None
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.readlink(f"/proc/self/fd/{opened}") == f"/memfd:{name} (deleted)":
                return _Page(opened)
        finally:
            os.close(opened)
    return None
