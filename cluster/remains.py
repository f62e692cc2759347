"""What may outlast a Ray that was ended: processes that hang in its exit, and a directory into which they write.

As a script, with a directory, words and files, it is a guard: should whoever holds its standard input end without a
farewell, it says the words and removes all of that. Ray ends a process without a word when its object store is gone,
and nobody can do anything about SIGKILL. It imports nothing but Python's own, so that it is there at once.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE_S = 5.0  # for processes that end by themselves; almost all do at once
SAID, FAREWELL = b"said;", b"farewell"
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


class Guard:
    """Another process that tidies up after this one, however it ends."""

    def __init__(self, directory: Path, last_words: str = "", leftovers: Sequence[Path] = ()) -> None:
        """`leftovers` are files that go with the directory; `last_words` go to standard error."""
        command = [sys.executable, "-I", __file__, str(directory), last_words, *map(str, leftovers)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def said(self) -> None:
        """The last words were said here."""
        with contextlib.suppress(OSError, ValueError):  # it is gone, or was dismissed
            assert self._process.stdin is not None
            self._process.stdin.write(SAID)
            self._process.stdin.flush()

    def dismiss(self) -> None:
        """This process has tidied up itself."""
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):  # it is gone, or was dismissed
            self._process.communicate(FAREWELL, timeout=PATIENCE_S)


def main(directory: str, last_words: str, *leftovers: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # which end everybody else
        signal.signal(number, signal.SIG_IGN)
    heard = sys.stdin.buffer.read()
    if heard.endswith(FAREWELL):
        return
    for leftover in leftovers:
        Path(leftover).unlink(missing_ok=True)
    if last_words and not heard.startswith(SAID):
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(last_words, file=sys.stderr, flush=True)
    leave_nothing(Path(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])
