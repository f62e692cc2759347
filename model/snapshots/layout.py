"""Where a run's snapshots lie, and what the names say.

ROOT/
  step-00000120/                        a snapshot: complete when it appeared, and never changed afterwards
    manifest.json
    NAME.safetensors …
  .writing-step-00000140-9f86d081884c/  an attempt; what it holds counts for nothing yet
  .removed-9f86d081884c/                being removed
  damaged-step-00000100-9f86d081884c/   set aside: not read again, kept until newer ones make it useless
"""

import re
import secrets
from pathlib import Path

from model.snapshots.errors import SnapshotError

MANIFEST = "manifest.json"
ATTEMPT = ".writing-"
REMOVED = ".removed-"
DAMAGED = "damaged-"

_STEP = re.compile(r"step-(\d{8,})")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.safetensors")


def step_name(step: int) -> str:
    """Name of the snapshot after `step` steps; raises SnapshotError for a negative one."""
    if step < 0:
        raise SnapshotError(f"step is {step}; expected the number of steps made, 0 or more")
    return f"step-{step:08d}"


def step_of(directory: Path) -> int | None:
    """The step that a snapshot's, an attempt's or a damaged one's name states; None for any other name."""
    name = directory.name
    if name.startswith((ATTEMPT, DAMAGED)):
        name = name.removeprefix(ATTEMPT).removeprefix(DAMAGED).rpartition("-")[0]
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def unique(prefix: str) -> str:
    """`prefix` with something that nobody else chose, on any machine."""
    return f"{prefix}{secrets.token_hex(6)}"


def check_attempt(staging: Path) -> int:
    """The step of an attempt; raises SnapshotError for any other directory: a snapshot is never written to."""
    step = step_of(staging)
    if step is None or not staging.name.startswith(ATTEMPT):
        raise SnapshotError(f"{staging} is no attempt at a snapshot; expected a directory that `begin` returned")
    return step


def check_shard_name(name: str) -> None:
    """Raises SnapshotError unless it is a plain file name."""
    if not _SHARD.fullmatch(name):
        raise SnapshotError(
            f"shard name {name!r:.300}: expected up to 200 letters, digits, '.', '_' and '-', then .safetensors"
        )
