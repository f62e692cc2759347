"""What `python -m kernels.build` says is what was built."""

from pathlib import Path

import pytest

from kernels import build

REFUSING = """#!/bin/sh
case "$*" in *{refused}*) echo "no such machine" >&2; exit 1;; esac
for last; do :; done
echo built > "$last"
"""


@pytest.fixture(autouse=True)
def kernels() -> None:
    """A compiler of its own, whatever kernels there are."""


def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """Build at an empty place with a compiler that refuses a flag."""
    compiler = tmp_path / "c++"
    compiler.write_text(REFUSING.format(refused=refused))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "PLACES", (tmp_path / "place",))
    monkeypatch.setattr(build, "buildable", lambda: ("avx512", "avx2", "portable"))
    assert build.main() == 0


def test_an_instruction_set_that_a_compiler_refuses_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built(tmp_path, monkeypatch, "x86-64-v4")
    said = capsys.readouterr()
    assert said.out == "kernels: avx2, portable\n"
    assert said.err == f"kernels: {tmp_path / 'c++'} cannot build avx512\nno such machine\n"
    assert [name for name in build.INSTRUCTION_SETS if build.library(name)] == ["avx2", "portable"]


def test_where_nothing_can_be_built_torch_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built(tmp_path, monkeypatch, "std")
    said = capsys.readouterr()
    assert said.out == "kernels: none, so the slower torch kernels serve\n"
    assert said.err.count("no such machine") == 3
