"""A command whose reader has left ends without a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.closed_pipe import while_it_is_read


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--json"], []])
def test_output_that_nobody_reads_ends_a_command_quietly(bundled: Path, unbuffered: str, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "services.cli", "plan", str(bundled), *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_another_broken_pipe_is_not_hidden() -> None:
    with pytest.raises(BrokenPipeError, match="of a socket"), while_it_is_read():
        raise BrokenPipeError("of a socket")
