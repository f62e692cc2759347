"""Memory that other processes of the machine and user can map: a file without a place, gone with its last user."""

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import weakref

ADDRESS = re.compile(r"(shoal-[0-9a-f]{32})/([0-9]{1,10})/([0-9]{1,10})")
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # else a peer could take pages away that we read


class SharedMemory:
    """`memory` of `nbytes`, all 0, which stays mapped for as long as anybody refers to it. Linux only."""

    def __init__(self, nbytes: int) -> None:
        name = f"shoal-{secrets.token_hex(16)}"
        file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close = weakref.finalize(self, os.close, file)
        os.ftruncate(file, nbytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
        self.memory = mmap.mmap(file, nbytes)
        self.address = f"{name}/{os.getpid()}/{file}"

    def close(self) -> None:
        """Nobody else can map it from now on; who did keeps it. Twice is once, and who forgets it does it."""
        self._close()


def map_shared(address: str, nbytes: int) -> mmap.mmap | None:
    """Another process's memory of at least `nbytes`; None where it is gone, cannot be reached or may shrink.

    Only a file of that very name is opened: it is written to. Raises ValueError for what is no address.
    """
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise ValueError(f"{address!r} is no address of shared memory")
    name, process, file = parts.groups()
    path = f"/proc/{process}/fd/{file}"
    with contextlib.suppress(OSError, ValueError):
        if os.readlink(path) != f"/memfd:{name} (deleted)":
            return None
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.readlink(f"/proc/self/fd/{opened}") != f"/memfd:{name} (deleted)":
                return None
            if fcntl.fcntl(opened, fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(opened).st_size < nbytes:
                return None
            return mmap.mmap(opened, nbytes)
        finally:
            os.close(opened)
    return None
