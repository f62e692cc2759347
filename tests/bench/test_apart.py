"""Both ways of a prefill are measured against a host in another process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def measure(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since it pins itself to cores."""
    command = [sys.executable, "-m", "bench.apart", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_both_ways_are_measured(checkpoint: Callable[[str], Path]) -> None:
    done = measure("--checkpoint", str(checkpoint("tiny")), "--repeats", "1", "--batch", "4")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:5] for line in done.stdout.splitlines() if line.startswith("| 4 ")]
    ((_, whole, halved, ratio),) = rows
    assert abs(float(halved.split()[0]) / float(whole.split()[0]) - float(ratio.split()[0])) < 0.02


def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    done = measure("--checkpoint", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "none" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_batch_of_none_is_refused() -> None:
    done = measure("--batch", "0")
    assert (done.returncode, "expected at least 1" in done.stderr) == (2, True)
