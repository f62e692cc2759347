"""How a snapshot's files go: nothing half removed is ever taken for something whole."""

import errno
import os
from collections.abc import Collection
from pathlib import Path

from model.snapshots.errors import SnapshotError
from model.snapshots.layout import REMOVED, unique
from model.snapshots.reading import reading

# somebody else removes it too, or, on NFS, a process of this machine has it open
NOT_OURS = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY)


def discard(directory: Path) -> None:
    """Remove a directory; one that is gone already is no error. Raises SnapshotError when it cannot be removed.

    It loses its name first, so nobody finds a part of it, and nobody writes into it any more.
    """
    hidden = directory.with_name(unique(REMOVED))
    try:
        os.rename(directory, hidden)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _failure(directory, error) from error
    _remove(hidden)


def sweep(root: Path) -> None:
    """Remove what is left of directories whose removal was cut short."""
    with reading(root):
        hidden = list(root.glob(f"{REMOVED}*"))
    for directory in hidden:
        _remove(directory)


def keep_only(directory: Path, names: Collection[str]) -> None:
    """Remove everything else in a directory."""
    with reading(directory):
        others = [path for path in directory.iterdir() if path.name not in names]
    for path in others:
        _remove(path)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            for inner in list(path.iterdir()):
                _remove(inner)
            os.rmdir(path)
        else:
            os.unlink(path)
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise _failure(path, error) from error


def _failure(path: Path, error: OSError) -> SnapshotError:
    return SnapshotError(f"{path} cannot be removed: {error.strerror}")
