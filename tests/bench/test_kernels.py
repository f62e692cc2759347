"""The packed product beside torch's, and where the tables of single measurements go."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import apart, kernels


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROWS", (1, 5)), ("ROUNDS", 1), ("WEIGHTS", 2), ("OUTPUTS", 40), ("INNER", 24)):
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "set_threads", lambda count: None)


@pytest.mark.usefixtures("brief")
def test_every_number_of_rows_has_its_figures_and_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.kernels", "--report"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / kernels.DOCUMENT).write_text(f"above\n{kernels.BEGIN}\nold\n{kernels.END}\nbelow\n")
    turns = iter([2.0, 1.0, 4.0, 1.0, 1.0, 0.5])
    monkeypatch.setattr(kernels, "_in_turn", lambda *ways: [next(turns) for _ in ways])
    assert kernels.main() == 0
    written = (tmp_path / kernels.DOCUMENT).read_text()
    assert written.startswith(f"above\n{kernels.BEGIN}\n**GFLOP/s of a product with [40, 24]")
    assert written.endswith(f"\n{kernels.END}\nbelow\n")
    rows = [line.replace(" ", "").strip("|").split("|") for line in written.splitlines() if line.startswith("| ")]
    assert [(row[0], *row[4:]) for row in rows[1:]] == [("1", "2.00", "4.00"), ("5", "0.50", "0.50")]
    assert "2.00" in capsys.readouterr().out


@pytest.mark.parametrize(("main", "name"), [(kernels.main, "kernels"), (apart.main, "apart")])
def test_a_document_that_is_not_there_is_told_before_anything_is_measured(
    main: Callable[[], int],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(*given: object) -> None:
        pytest.fail("it was measured")

    monkeypatch.setattr(sys, "argv", [f"bench.{name}", "--report"])
    monkeypatch.setattr(sys.modules[main.__module__], "measure", measure)
    monkeypatch.chdir(tmp_path)
    assert main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bench.{name}: docs/performance.md cannot be read")
