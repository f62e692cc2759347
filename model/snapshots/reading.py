"""Looking at a snapshot's files, with errors that tell damage from trouble that may pass."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from model.snapshots.errors import SnapshotBroken, SnapshotError

DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # no rights, or a stale handle, say nothing about it


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into SnapshotBroken where the file is missing or unreadable for good, else SnapshotError."""
    try:
        yield
    except OSError as error:
        kind = SnapshotBroken if error.errno in DAMAGE else SnapshotError
        raise kind(f"{path} cannot be read: {error.strerror}") from error


def check_size(path: Path, nbytes: int) -> None:
    """Raises SnapshotBroken when the file is missing or has another size."""
    with reading(path), path.open("rb", buffering=0) as file:  # only on opening does NFS state a size for sure
        found = os.fstat(file.fileno()).st_size
    if found != nbytes:
        raise SnapshotBroken(f"{path} is {found} bytes long; {nbytes} were written")


def sha256_of(path: Path) -> str:
    with reading(path), path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_change_s(directory: Path) -> float:
    """When a flat directory or a file in it changed last, by the file system's clock; 0 where it is gone."""
    newest = 0.0
    with reading(directory), contextlib.suppress(FileNotFoundError):
        for path in (*directory.iterdir(), directory):  # itself last: a file that is renamed meanwhile shows there
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, path.stat().st_mtime)
    return newest
