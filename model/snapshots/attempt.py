"""An attempt at a snapshot, from its empty directory to the rename that makes it one."""

import contextlib
from pathlib import Path

from model.snapshots import disk
from model.snapshots.errors import DiskFull, SnapshotBroken, SnapshotError
from model.snapshots.history import set_aside
from model.snapshots.layout import ATTEMPT, MANIFEST, check_attempt, step_name, unique
from model.snapshots.manifest import Manifest, encode
from model.snapshots.reading import check_size, last_change_s, reading
from model.snapshots.removal import discard, keep_only, sweep
from model.snapshots.snapshot import Snapshot

IDLE_S = 3600.0
"""An attempt in which nothing changed for so long is taken for dead."""


def begin(root: Path, step: int) -> Path:
    """A new directory for the files of a snapshot after `step` steps, on the file system of `root`.

    Attempts never share one. Those in which nothing changed for IDLE_S, by the file system's clock, are given up: their
    writers died, and a writer that did not loses an attempt, no snapshot. Who knows that there is no other attempt, as
    a run that starts does, calls abandon_all() first.

    Raises DiskFull, or SnapshotError when the directory cannot be made.
    """
    root = root.absolute()
    staging = root / unique(f"{ATTEMPT}{step_name(step)}-")
    disk.make_directory(staging)
    now_s = last_change_s(staging)
    for other in _attempts(root):
        with contextlib.suppress(SnapshotError):  # what cannot be removed takes room, and is in nobody's way
            if now_s - last_change_s(other) > IDLE_S:
                discard(other)
    with contextlib.suppress(SnapshotError):
        sweep(root)
    return staging


def commit(staging: Path, manifest: Manifest) -> Path:
    """Make the attempt the snapshot of its step, and return its directory; everything is on disk then.

    Files that the manifest does not name are dropped. A snapshot with the same content may be there already: it stays,
    so the call may be repeated. One that is broken is set aside.

    Raises SnapshotError when the attempt was given up, a shard is missing or has another size, the step is not the
    attempt's, or it has another snapshot; what is there stays, to be mended and committed, or abandoned. Raises
    DiskFull after giving the attempt up.
    """
    step = check_attempt(staging)
    if manifest.step != step:
        raise SnapshotError(f"the manifest is of step {manifest.step}, {staging} was begun for step {step}")
    target = staging.parent / step_name(step)
    with reading(staging):
        gone = not staging.exists()
    if gone:
        return _committed_before(staging, target, manifest)
    for shard in manifest.shards:
        check_size(staging / shard.name, shard.nbytes)
    keep_only(staging, {shard.name for shard in manifest.shards})
    raw = encode(manifest)
    try:
        disk.write_file(staging / MANIFEST, [raw], len(raw))
        return _publish(staging, target, manifest)
    except DiskFull:
        with contextlib.suppress(SnapshotError):  # that the disk is full is what must be told
            abandon(staging)
        raise


def abandon(staging: Path) -> None:
    """Give up an attempt, for all of its writers; who still writes gets a SnapshotError."""
    check_attempt(staging)
    discard(staging)


def abandon_all(root: Path) -> None:
    """Give up every attempt under `root`, whoever began it."""
    sweep(root)
    for staging in _attempts(root):
        discard(staging)


def _publish(staging: Path, target: Path, manifest: Manifest) -> Path:
    while not disk.move(staging, target):
        try:
            standing = _standing(target)
        except SnapshotBroken:
            set_aside(target)
            continue
        if standing != manifest:
            raise SnapshotError(
                f"{target} is another snapshot of this step, of run {standing.run_id!r}: "
                "move it away, or give this run another directory for snapshots"
            )
        abandon(staging)
        return target
    return target


def _committed_before(staging: Path, target: Path, manifest: Manifest) -> Path:
    with contextlib.suppress(SnapshotBroken):
        if _standing(target) == manifest:
            disk.sync_directory(target.parent)  # whoever renamed it may have died before
            return target
    raise SnapshotError(f"{staging} was given up, here or elsewhere; begin another attempt")


def _standing(directory: Path) -> Manifest:
    snapshot = Snapshot.open(directory)
    snapshot.check_sizes()
    return snapshot.manifest


def _attempts(root: Path) -> list[Path]:
    with reading(root):
        return list(root.glob(f"{ATTEMPT}*"))
