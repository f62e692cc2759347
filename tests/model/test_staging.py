"""A directory appears whole; what a killed process left of one is gone with the next attempt, a living one's is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.staging import staged, sweep

WRITER = """
import sys
from pathlib import Path
from model.staging import hidden_beside, staged
with hidden_beside(Path(sys.argv[1])) as hidden, staged(hidden / "model") as staging:
    (staging / "weights").write_bytes(bytes(1000))
    print("written", flush=True)
    sys.stdin.read()
"""


def begin(out: Path) -> "subprocess.Popen[str]":
    """A process that writes to become `out`, and waits before it is done."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "written\n"
    return writer


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


def test_what_a_killed_process_left_is_removed_with_the_next_attempt(tmp_path: Path) -> None:
    with begin(tmp_path / "model") as writer:
        writer.kill()
    assert "weights" in files(tmp_path)
    sweep(tmp_path / "mod")  # another name
    assert "weights" in files(tmp_path)
    with staged(tmp_path / "model") as staging:
        assert "weights" not in files(tmp_path)
        (staging / "config").write_text("{}")
    assert files(tmp_path) == {"config"}
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    with begin(tmp_path / "model") as writer:
        sweep(tmp_path / "model")
        assert "weights" in files(tmp_path)
        with staged(tmp_path / "model"):
            pass
        assert "weights" in files(tmp_path)
        assert writer.stdin is not None
        writer.stdin.close()  # it goes on to its end
        assert writer.wait(60) == 0
    assert files(tmp_path) == set()


def test_a_file_system_without_locks_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with begin(tmp_path / "model") as writer:
        writer.kill()

    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("model.staging.fcntl.flock", none)
    with staged(tmp_path / "model") as staging:
        (staging / "config").write_text("{}")
    assert files(tmp_path / "model") == {"config"}
    assert "weights" in files(tmp_path)


def test_who_may_read_the_parent_may_read_what_appears(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with staged(tmp_path / "model"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
