"""Of a Ray that was ended nothing stays: no process that hangs, and no directory, whoever still writes into it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster import remains

ROOT = Path(__file__).parent.parent.parent
HANGS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
ENDS = "import time; print(1, flush=True); time.sleep(0.4)"


@pytest.fixture
def started() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, code: str, output: Path) -> "subprocess.Popen[bytes]":
    """A process whose output goes to a file, and which has written there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=file)
    stack.callback(process.wait)
    stack.callback(process.kill)
    deadline_s = time.monotonic() + 20
    while not output.read_bytes():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return process


def test_a_process_that_hangs_is_ended_and_others_are_left_alone(tmp_path: Path, started: ExitStack) -> None:
    ours = start(started, HANGS, tmp_path / "session-1" / "logs" / "worker.out")
    other = start(started, HANGS, tmp_path / "session-11" / "worker.out")
    assert remains.writers(tmp_path / "session-1") == [ours.pid]
    remains.remove_for_good(tmp_path / "session-1")
    assert remains.writers(tmp_path / "session-1") == [ours.pid]  # its file is gone, and it is not
    remains.leave_nothing(tmp_path / "session-1", patience_s=0.3)
    assert ours.wait(10) < 0
    assert other.poll() is None
    assert not (tmp_path / "session-1").exists()
    assert (tmp_path / "session-11").exists()


def test_one_that_ends_by_itself_is_waited_for(tmp_path: Path, started: ExitStack) -> None:
    process = start(started, ENDS, tmp_path / "session" / "worker.out")
    remains.leave_nothing(tmp_path / "session", patience_s=20)
    assert process.wait(10) == 0
    assert not (tmp_path / "session").exists()


def test_the_asking_process_is_not_among_them(tmp_path: Path) -> None:
    kept = os.dup(1)
    try:
        with (tmp_path / "out").open("wb") as file:
            os.dup2(file.fileno(), 1)
            assert remains.writers(tmp_path) == []
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_what_is_made_anew_meanwhile_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "session"
    (directory / "logs").mkdir(parents=True)
    looks: list[float] = []

    def write_late(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) in (1, 3, 4):
            (directory / "runtime_resources").mkdir(parents=True)

    monkeypatch.setattr(remains.time, "sleep", write_late)
    remains.remove_for_good(directory)
    assert not directory.exists()
    assert len(looks) == 5 + remains.QUIET_LOOKS - 1  # gone for the last time at the fifth look, and quiet since


GUARDED = """
import os, signal, sys
from pathlib import Path
from cluster.remains import Guard
guard = Guard(Path(sys.argv[1]), "the last words", [Path(sys.argv[2])])
print(guard.pid, flush=True)
sys.stdin.readline()
if sys.argv[3] == "dismiss":
    guard.dismiss()
    guard.dismiss()
    guard.said()
elif sys.argv[3] == "say":
    guard.said()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["dismiss", "say", "without a word"])
def test_a_guard_tidies_up_after_a_process_that_did_not(tmp_path: Path, end: str) -> None:
    directory, leftover = tmp_path / "session", tmp_path / "leftover"
    directory.mkdir()
    leftover.touch()
    command = [sys.executable, "-c", GUARDED, str(directory), str(leftover), end]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        guard = int(process.stdout.readline())
        wait_for_signals_to_be_ignored(guard)
        for number in (signal.SIGTERM, signal.SIGINT):  # as whoever ends all processes at once sends
            os.kill(guard, number)
        _, said = process.communicate("now\n", timeout=30)  # the guard holds standard error, and is waited for
    assert ("the last words" in said) == (end == "without a word")
    assert directory.exists() == leftover.exists() == (end == "dismiss")


def wait_for_signals_to_be_ignored(pid: int) -> None:
    deadline_s = time.monotonic() + 20
    ignored = 0
    while not ignored >> (signal.SIGHUP - 1) & 1:  # the last one
        assert time.monotonic() < deadline_s
        status = Path(f"/proc/{pid}/status").read_text()
        ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn:")).split()[1], 16)
