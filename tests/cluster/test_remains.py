"""Of a Ray that was ended nothing stays: no process that hangs, and no directory, whoever still writes into it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster import remains

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
