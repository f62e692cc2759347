"""A process, in which torch is loaded once, whose children write snapshots or are killed at it.

`kill ROOT CHANGES`: child k works on a copy of ROOT, at ROOT.k, and is killed before its k-th change.
`write STAGING COUNT NAME …`: a child for each NAME writes COUNT files NAME-i.safetensors, and they print the checksums.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from model.snapshots.history import prune
from model.snapshots.shard_file import write_shard
from tests.model.snapshot_runs import Os, files, install, write


def work(root: Path) -> None:
    """What a run does at a snapshot."""
    write(root, 20)
    prune(root, 1)


def _killed_at(root: Path, change: int) -> None:
    def before(number: int, *_: object) -> None:
        if number == change:
            os.kill(os.getpid(), signal.SIGKILL)

    install(pytest.MonkeyPatch(), Os(before))
    work(root)


def _kill_at_each(root: Path, changes: int) -> None:
    for change in range(1, changes + 1):
        copy = root.with_name(f"{root.name}.{change}")
        shutil.copytree(root, copy)
        child = os.fork()
        if child == 0:
            _killed_at(copy, change)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, change


def _write(staging: Path, count: int, name: str) -> None:
    for number in range(count):
        written = write_shard(staging, f"{name}-{number}.safetensors", files(number)[f"{name}.safetensors"])
        os.write(sys.stdout.fileno(), f"{written.name} {written.sha256}\n".encode())


def _write_at_once(staging: Path, count: int, names: list[str]) -> None:
    children = []
    for name in names:
        child = os.fork()
        if child == 0:
            _write(staging, count, name)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["kill", root, changes]:
            _kill_at_each(Path(root), int(changes))
        case ["write", staging, count, *names]:
            _write_at_once(Path(staging), int(count), names)
