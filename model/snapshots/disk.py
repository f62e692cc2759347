"""How a snapshot's files come to be on disk: whole or not at all, to stay once written, with errors by path."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from model.snapshots.errors import DiskFull, SnapshotError
from model.snapshots.layout import unique

Buffer = bytes | memoryview

CHUNK_BYTES = 2**21  # hashed and written in turn, while it is in the cache
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IN_USE = (errno.EEXIST, errno.ENOTEMPTY)


def write_file(path: Path, parts: Iterable[Buffer], nbytes: int) -> str:
    """Write `parts`, `nbytes` in all, and return their SHA-256; the file appears when all of it is on disk.

    An earlier file of this name is replaced. Several writers of one name do not meet: the last one's stays.
    Raises DiskFull, or SnapshotError when the directory is gone or refuses.
    """
    digest = hashlib.sha256()
    temporary = path.with_name(unique(f".{path.name}.part-"))
    renamed = False
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for chunk in _chunks(parts):
                digest.update(chunk)
                _write(handle, chunk)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.rename(temporary, path)
        renamed = True
        _sync(path.parent)
    except OSError as error:
        raise _failure(path, error, nbytes) from error
    finally:
        if not renamed:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return digest.hexdigest()


def make_directory(path: Path) -> None:
    """A new directory; parents are made where they are missing, and last."""
    try:
        _make_parents(path.parent)
        os.mkdir(path)
    except OSError as error:
        raise _failure(path, error) from error


def move(path: Path, target: Path) -> bool:
    """Rename a directory beside itself, lastingly; False, and nothing is done, when the target is in use."""
    try:
        os.rename(path, target)
        _sync(target.parent)
    except OSError as error:
        if error.errno in IN_USE:
            return False
        raise _failure(path, error) from error
    return True


def sync_directory(directory: Path) -> None:
    """Make what was renamed in a directory last; on a shared file system, whoever renamed must ask for it."""
    try:
        _sync(directory)
    except OSError as error:
        raise _failure(directory, error) from error


def _chunks(parts: Iterable[Buffer]) -> Iterator[Buffer]:
    for part in parts:
        for begin in range(0, len(part), CHUNK_BYTES):
            yield part[begin : begin + CHUNK_BYTES]


def _write(handle: int, chunk: Buffer) -> None:
    written = 0
    while written < len(chunk):
        written += os.write(handle, chunk[written:])


def _make_parents(directory: Path) -> None:
    if directory.is_dir():
        return
    _make_parents(directory.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory)
    _sync(directory.parent)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system sees to its directories itself
            raise
    finally:
        os.close(handle)


def _failure(path: Path, error: OSError, nbytes: int = 0) -> SnapshotError:
    if error.errno in FULL:
        room = f"it needs {nbytes} bytes" if nbytes else "it needs a directory entry"
        with contextlib.suppress(OSError):
            disk = os.statvfs(path.parent)
            room += f", {disk.f_bavail * disk.f_frsize} bytes are free"
        return DiskFull(f"{path} cannot be written, the disk is full ({error.strerror}): {room}; make room")
    if error.errno == errno.ENOENT:
        return SnapshotError(f"{path} cannot be written: it or its directory was given up or removed")
    return SnapshotError(f"{path} cannot be written: {error.strerror}")
