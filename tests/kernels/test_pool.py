"""The team of threads while it is resized, under ThreadSanitizer."""

import subprocess
from pathlib import Path

import pytest

from kernels.build import SOURCES, compiler

FLAGS = ("-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=thread")


@pytest.fixture(autouse=True)
def kernels() -> None:
    """One program of its own, whatever kernels there are."""


def compiled(tmp_path: Path, source: str, *parts: str) -> Path:
    """A program of `source` with parts of the library; skips where the compiler has no ThreadSanitizer."""
    cxx = compiler()
    if cxx is None:
        pytest.skip("no C++ compiler")
    empty, program = tmp_path / "empty.cpp", tmp_path / "program"
    empty.write_text("int main() {}")
    if subprocess.run([cxx, *FLAGS, empty, "-o", program], capture_output=True, check=False).returncode:
        pytest.skip(f"{cxx} has no ThreadSanitizer")
    sources = [Path(__file__).with_name(source), *(SOURCES / part for part in parts)]
    subprocess.run([cxx, *FLAGS, "-I", SOURCES, *sources, "-o", program], check=True)
    return program


def test_the_team_may_be_resized_while_others_compute(tmp_path: Path) -> None:
    program = compiled(tmp_path, "resized_pool.cpp", "pool.cpp", "threads.cpp")
    ran = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
