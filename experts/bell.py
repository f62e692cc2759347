"""A doorbell between processes of one machine: sleep until somebody rings, at no cost meanwhile.

NIXL's notifications are found by polling only, and a short sleep costs half a core where timers are slow. So whoever
sends also rings, and whoever waits sleeps on a socket. A ring carries nothing: it is a hint to poll, may be lost or
come for nothing, and a stranger who rings costs one poll. A byte of shared memory says whether anybody sleeps, which
spares the ring where nobody does.
"""

import contextlib
import mmap
import os
import re
import secrets
import select
import socket
import threading
from collections.abc import Callable

ADDRESS = re.compile(r"(shoal-[0-9a-f]{32})/([0-9]{1,10})/([0-9]{1,10})")


class Bell:
    """The waiting end. `address` is for those who ring it, and cannot be guessed. Linux only."""

    def __init__(self) -> None:
        name = f"shoal-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(_abstract(name))
        # an open file without a name: it is gone with this process, however that ends
        self._file = os.memfd_create("shoal-bell", os.MFD_CLOEXEC)
        os.ftruncate(self._file, mmap.PAGESIZE)
        self._asleep = mmap.mmap(self._file, mmap.PAGESIZE)
        self.address = f"{name}/{os.getpid()}/{self._file}"
        self._to_self = Ringer(self.address)
        self._attending = self._sleeping = 0
        self._lock = threading.Lock()

    def ring(self) -> None:
        """Wake whoever waits here."""
        self._to_self.ring()

    def wait(self, timeout_s: float, look: Callable[[], object]) -> None:
        """Sleep until it rings, or `timeout_s` seconds, unless `look` finds something.

        `look` is called once more after the world was told that somebody sleeps: what is sent before that comes
        without a ring. Several threads may wait; a ring wakes them all.
        """
        with self._lock:
            self._sleeping += 1
            self._asleep[0] = 1
        try:
            if look():
                return
            polled = select.poll()  # one of each thread's own: they cannot be shared
            polled.register(self._socket, select.POLLIN)
            polled.poll(max(1.0, timeout_s * 1000))
        finally:
            with self._lock:
                self._sleeping -= 1
                if not self._sleeping:
                    self._asleep[0] = 0
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            self._socket.recv(1)

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
        self._to_self.close()
        self._socket.close()
        self._asleep.close()
        os.close(self._file)


class Ringer:
    """Rings the bell of one process; one that is gone hears nothing. Raises ValueError for what is no address."""

    def __init__(self, address: str) -> None:
        parts = ADDRESS.fullmatch(address)
        if parts is None:
            raise ValueError(f"{address!r} is no bell's address")
        name, process, file = parts.groups()
        self._address = _abstract(name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._asleep = _map_readable(f"/proc/{process}/fd/{file}")

    def ring(self) -> None:
        if self._asleep is not None and not self._asleep[0]:
            return
        # a full bell will wake its owner anyway; one that is gone is its lease's to notice
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError, ConnectionResetError):
            self._socket.sendto(b"!", self._address)

    def close(self) -> None:
        self._socket.close()
        if self._asleep is not None:
            self._asleep.close()


def _abstract(name: str) -> str:
    """A socket's name that needs no file and ends with its socket."""
    return "\0" + name


def _map_readable(path: str) -> mmap.mmap | None:
    """One page of another process's file; None where that is not allowed, and every ring must be sent."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return mmap.mmap(file, mmap.PAGESIZE, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
