"""What may outlast a Ray that was ended: processes that hang in its exit, and a directory into which they write."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

PATIENCE_S = 5.0  # for processes that end by themselves; almost all do at once
LOOK_S, QUIET_LOOKS, MOST_LOOKS = 0.1, 3, 100  # at a directory that is to go


def leave_nothing(directory: Path, patience_s: float = PATIENCE_S) -> None:
    """Have every process end whose output goes below a Ray's directory, by force after a while, and remove it.

    A worker of Ray may wait for ever, as it exits, for a lock that it holds itself.
    """
    for pid in _left(directory, patience_s):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _left(directory, patience_s)  # one that held much memory takes a while to go
    remove_for_good(directory)


def _left(directory: Path, patience_s: float) -> list[int]:
    """Its `writers`, once there are none or after a while."""
    deadline_s = time.monotonic() + patience_s
    while (left := writers(directory)) and time.monotonic() < deadline_s:
        time.sleep(LOOK_S)
    return left


def writers(directory: Path) -> list[int]:
    """Other processes of ours whose standard output or error is a file below a directory, also one that is gone."""
    below = f"{directory.resolve()}/"
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        for number in (1, 2):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if os.readlink(process / "fd" / str(number)).startswith(below):
                    found.add(int(process.name))
    return sorted(found - {os.getpid()})


def remove_for_good(directory: Path) -> None:
    """Remove a directory into which processes that are just ending may still write."""
    quiet = 0
    for _ in range(MOST_LOOKS):
        if directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
            quiet = 0
        elif (quiet := quiet + 1) == QUIET_LOOKS:
            return
        time.sleep(LOOK_S)
