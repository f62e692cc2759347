"""An output directory is written by one run at a time."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
LOCK = ".lock"  # stays: who removed it could not know who has opened it meanwhile


@contextlib.contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Hold the directory, which must exist; raises ValueError while another process does, however that ends.

    A file system without locks, as some clusters have, holds nothing.
    """
    lock = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run writes to {output_dir} now: wait until it has ended, or give another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(lock)
