"""Files by which a run's command and its workers speak: to stop, how it ended, and what a person should know."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from model.snapshots.disk import write_file

SNAPSHOTS = "snapshots"
STOP = "stop"  # whoever makes it asks the run to end after a snapshot
DONE = "done.json"
LOG = "log.txt"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended; `failed` says why it could not go on, `result` where what it made lies."""

    steps: int = 0  # made
    result: str | None = None
    failed: str | None = None
    identity: dict[str, Any] | None = None  # of the run, where there is a result


def write_outcome(output_dir: Path, outcome: Outcome) -> None:
    """Raises what `write_whole` raises."""
    write_whole(output_dir / DONE, json.dumps(asdict(outcome)))


def read_outcome(output_dir: Path) -> Outcome | None:
    """None where no worker came to an end, or what lies there is no outcome."""
    try:
        return TypeAdapter(Outcome).validate_json((output_dir / DONE).read_bytes(), strict=True)
    except (FileNotFoundError, ValidationError):
        return None


def begin_outcome(output_dir: Path) -> None:
    """Forget how an earlier attempt ended."""
    (output_dir / DONE).unlink(missing_ok=True)


def tell(output_dir: Path, message: str) -> None:
    """Add a line for people; to standard error where that cannot be, as on a full disk."""
    try:
        with (output_dir / LOG).open("a", encoding="utf-8") as log:
            log.write(message + "\n")
    except OSError:
        print(message, file=sys.stderr)


def told(output_dir: Path, since: int = 0) -> tuple[list[str], int]:
    """Lines told after the first `since` bytes, and how many bytes there are."""
    try:
        raw = (output_dir / LOG).read_bytes()
    except FileNotFoundError:
        return [], 0
    return raw[since:].decode(errors="replace").splitlines(), len(raw)


def read_kept(path: Path) -> Any:
    """JSON that `write_whole` wrote; None where there is none, or something else lies there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all, and lastingly; raises SnapshotError (DiskFull) where it cannot be."""
    raw = f"{text}\n".encode()
    write_file(path, [raw], len(raw))
