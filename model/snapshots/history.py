"""Which snapshots a directory has: the newest that is whole, those that are no longer needed, those set aside."""

from dataclasses import dataclass
from pathlib import Path

from model.snapshots import disk
from model.snapshots.errors import SnapshotBroken, SnapshotError
from model.snapshots.layout import ATTEMPT, DAMAGED, step_of, unique
from model.snapshots.reading import reading
from model.snapshots.removal import discard, sweep
from model.snapshots.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Newest:
    """`skipped` says, a line each, why newer ones were passed over."""

    snapshot: Snapshot | None
    skipped: tuple[str, ...] = ()


def snapshots(root: Path) -> list[Path]:
    """Directories of snapshots, the newest first, whole or not; none where `root` does not exist."""
    return [path for _, path in _by_step(root) if not path.name.startswith(DAMAGED)]


def open_newest(root: Path) -> Newest:
    """The newest snapshot whose manifest holds and whose files are all there in their sizes.

    Contents of shards are verified as they are read. Where that fails, set_aside() it and call this again.
    Raises SnapshotError when one cannot be judged, being of another version, or the file system refusing just now: to
    go back behind it would lose what it holds.
    """
    skipped: list[str] = []
    for path in snapshots(root):
        try:
            return Newest(_whole(path), tuple(skipped))
        except SnapshotBroken as error:
            skipped.append(str(error))
    return Newest(None, tuple(skipped))


def prune(root: Path, keep: int) -> list[Path]:
    """Remove what is older than the newest `keep` whole snapshots, damaged ones included, and return the paths.

    Attempts are left alone, and nothing is removed while there are fewer than `keep` whole ones. Raises SnapshotError
    when keep is not positive, as open_newest() does, or when one cannot be removed.
    """
    if keep < 1:
        raise SnapshotError(f"keep is {keep}; expected how many snapshots shall stay, 1 or more")
    sweep(root)
    whole = 0
    for path in snapshots(root):
        try:
            whole += _whole(path) is not None
        except SnapshotBroken:
            continue
        if whole == keep:
            older = [other for step, other in reversed(_by_step(root)) if step < (step_of(path) or 0)]
            for other in older:
                discard(other)
            return older
    return []


def set_aside(directory: Path) -> Path:
    """Take a snapshot out of the way without losing it, and return where it is now."""
    if step_of(directory) is None or directory.name.startswith((ATTEMPT, DAMAGED)):
        raise SnapshotError(f"{directory} is no snapshot; expected a directory that `snapshots` returned")
    target = directory.with_name(unique(f"{DAMAGED}{directory.name}-"))
    disk.move(directory, target)
    return target


def _whole(directory: Path) -> Snapshot:
    snapshot = Snapshot.open(directory)
    if snapshot.manifest.step != step_of(directory):
        raise SnapshotBroken(f"{directory} holds step {snapshot.manifest.step}: it was renamed")
    snapshot.check_sizes()
    return snapshot


def _by_step(root: Path) -> list[tuple[int, Path]]:
    """Snapshots, damaged ones too, the newest first."""
    with reading(root):
        if not root.exists():
            return []
        paths = [path for path in root.iterdir() if not path.name.startswith(ATTEMPT)]
    steps = [(step, path) for path in paths if (step := step_of(path)) is not None]
    return sorted(steps, reverse=True)
