"""A directory that appears under its name only when all of it is written."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from model.safetensors_header import CheckpointError
from model.snapshots.disk import FULL


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
    """A new directory beside `out` to write into; it is synced and becomes `out` when the block ends well.

    Whatever the block raises, `out` stays as it was. Raises CheckpointError when `out` is in use, and NotWritten
    when the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty directory: give a new one")
    try:
        with _written(out) as staging:
            yield staging
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NotWritten(out, f"the disk is full ({error.strerror}); make room") from error


@contextlib.contextmanager
def _written(out: Path) -> Iterator[Path]:
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    staging.chmod(0o755)
    try:
        yield staging
        for path in [*staging.iterdir(), staging]:
            _sync(path)
        if out.exists():
            out.rmdir()
        staging.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
