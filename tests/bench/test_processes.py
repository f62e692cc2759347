"""What belongs to a service is found, also when its parent is no longer its parent."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.processes import cpu_s, family, memory, started_ticks

SLEEPER = [sys.executable, "-c", "print(flush=True); input()"]


@contextmanager
def sleeper(environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is itself: until then it is a copy of this one, with our memory and environment."""
    with subprocess.Popen(SLEEPER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.communicate(b"\n")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with sleeper() as process:
        yield process


def test_a_child_belongs_to_the_family(child: subprocess.Popen[bytes]) -> None:
    assert family(os.getpid())[0] == os.getpid()
    assert child.pid in family(os.getpid())
    assert family(child.pid) == [child.pid]


def test_a_worker_belongs_to_the_raylet_that_its_environment_names(child: subprocess.Popen[bytes]) -> None:
    with sleeper(os.environ | {"RAY_RAYLET_PID": str(child.pid)}) as worker:
        assert family(child.pid) == [child.pid, worker.pid]


def test_memory_and_time_of_a_process_that_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert (memory(process.pid), cpu_s(process.pid), started_ticks(process.pid)) == (None, 0.0, None)


def test_memory_of_a_process_that_runs(child: subprocess.Popen[bytes]) -> None:
    found = memory(child.pid, "sleeper")
    assert found is not None
    assert found.role == "sleeper"
    assert found.peak_bytes > 1_000_000
    assert 0 < found.share_bytes <= found.peak_bytes
