"""A directory that appears under its name only when all of it is written."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from model.safetensors_header import CheckpointError
from model.snapshots.disk import FULL

UNFINISHED = "unfinished"  # `.NAME.unfinished.abcd1234` is written to become NAME
LOCK = ".lock"  # in that directory, held by the process that writes there


class NotWritten(CheckpointError):
    """A directory that cannot be written, as on a full disk."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} cannot be written: {self.reason}"


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new directory to write into; it is synced and becomes `out` when the block ends well.

    Whatever the block raises, `out` stays as it was. Raises CheckpointError when `out` is in use, and NotWritten
    when the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty directory: give a new one")
    try:
        with hidden_beside(out) as hidden:
            staging = hidden / out.name
            staging.mkdir()
            staging.chmod(0o755)
            yield staging
            for path in [*staging.iterdir(), staging]:
                _sync(path)
            if out.exists():
                out.rmdir()
            staging.rename(out)
            _sync(out.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NotWritten(out, f"the disk is full ({error.strerror}); make room") from error


@contextlib.contextmanager
def hidden_beside(out: Path) -> Iterator[Path]:
    """A new hidden directory for what becomes `out`, removed when the block ends.

    What processes that were ended left of such directories is removed first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out)
    hidden = Path(tempfile.mkdtemp(prefix=".", dir=out.parent))
    try:
        with _locked(hidden):
            hidden = hidden.rename(hidden.with_name(f".{out.name}.{UNFINISHED}{hidden.name}"))  # what `sweep` looks for
            yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove what processes that were ended left of attempts at `out`; one that is written now stays."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.{UNFINISHED}.*"):
        with contextlib.suppress(OSError):  # it is gone, or another user's
            with _locked(left) as nobodys:
                pass
            if nobodys:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether this process holds the directory until the block ends: another may, or the file system has no locks."""
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held = False
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
