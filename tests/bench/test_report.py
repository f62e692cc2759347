"""README's table and the plots come from the result file alone."""

import json
import re
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.gpu import BEGIN as GPU_BEGIN
from bench.gpu import END as GPU_END
from bench.gpu_options import OUTPUT as GPU_OUTPUT
from bench.gpu_results import read_results as read_gpu_results
from bench.gpu_table import markdown as gpu_markdown
from bench.options import OUTPUT
from bench.report import BEGIN, END, README, main, markdown, replace_between, write_report
from bench.results import read_results, write_results
from tests.bench.results import made_by_hand


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Above\n\n{BEGIN}\nold figures\n{END}\n\nbelow\n")
    return path


def test_a_result_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "latest.json"
    write_results(made_by_hand(), path)
    assert read_results(path) == made_by_hand()


def test_the_report_replaces_only_what_stands_between_the_markers(readme: Path, tmp_path: Path) -> None:
    written = write_report(made_by_hand(), readme, tmp_path / "docs")
    text = readme.read_text()
    assert text.startswith(f"# Above\n\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\n\nbelow\n")
    assert "old figures" not in text
    assert {path.name for path in written} == {"README.md", "bench-prefill.svg", "bench-decode.svg", "bench-http.svg"}
    assert all(path.read_text().rstrip().endswith("</svg>") for path in written[1:])
    write_report(made_by_hand(), readme, tmp_path / "docs")
    assert readme.read_text() == text


def test_the_table_holds_the_measured_figures() -> None:
    text = markdown(made_by_hand())
    rows = {cells[0]: cells[1:] for line in text.splitlines() if (cells := re.findall(r"\| ([^|]+?) (?=\|)", line))}
    assert rows["shoal-local"] == ["200 (190-210)", "28.0 (26.0-30.0)"]
    assert rows["shoal-local ÷ transformers"] == ["2.00 (1.90-2.10)", "2.80 (2.60-3.00)"]
    assert rows["shoal-2 ÷ shoal-local"] == ["0.96 (0.95-0.97)", "0.89 (0.88-0.91)"]
    assert rows["8 streams"] == ["900", "1200", "81.5", "140.2", "23.0", "0.96 (0.95-0.97)"]
    assert rows["nixl, 64 KB each way"] == ["57", "103"]
    assert rows["2 hosts"] == ["7000", "24576", "1.75"]
    assert rows["shoal-2: expert host (2)"] == ["2048", "3072"]
    assert "Of a service's expert hosts one is its stand-by" in text
    assert "uses 2.0 % of a core, 0.5 % without Ray's own processes" in text
    assert "together and without Ray: 1.2 % by nixl." in text
    assert "Who waits for a host that is killed is told so after 31 ms by nixl." in text
    assert "200 GFLOP/s here" in text
    assert "at most 500 tokens/s, which is transformers' prefill times 5.0 at B=8." in text
    assert "A processor, 2 cores, 24 GiB" in text
    assert "`python -m bench` at 0123456789ab, 2026-01-02, 10 minutes" in text
    assert "B=8: sdpa attention and grouped_mm experts for prefill" in text


def test_readmes_figures_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m bench.report` brings them there, and `python -m bench.gpu --report`."""
    monkeypatch.chdir(Path(__file__).parents[2])
    text = README.read_text()
    assert text == replace_between(README, BEGIN, END, markdown(read_results(OUTPUT)))
    assert text == replace_between(README, GPU_BEGIN, GPU_END, gpu_markdown(read_gpu_results(GPU_OUTPUT)))


def test_a_section_without_figures_says_why() -> None:
    text = markdown(made_by_hand(round_trips_missing="the module is not there"))
    assert "No dispatch round trips: the module is not there." in text
    assert "Dispatch round trip, same node" not in text


def test_a_quick_run_makes_no_claim() -> None:
    quick = made_by_hand()
    quick = quick.model_copy(update={"run": quick.run.model_copy(update={"quick": True})})
    assert "its figures say nothing" in markdown(quick)


@pytest.mark.parametrize("text", ["no markers", f"{END}\n{BEGIN}\n", BEGIN])
def test_a_readme_without_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(BenchError, match="the table goes between them"):
        write_report(made_by_hand(), path, tmp_path)
    assert path.read_text() == text
    assert not list(tmp_path.glob("*.svg"))


def test_the_command_says_what_is_wrong_with_its_file(
    tmp_path: Path, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none.json")]) == 1
    assert "`python -m bench` writes it" in capsys.readouterr().err
    path = tmp_path / "latest.json"
    write_results(made_by_hand(), path)
    raw = json.loads(path.read_text())
    del raw["run"]["seed"]
    path.write_text(json.dumps(raw))
    assert main([str(path), "--readme", str(readme)]) == 1
    assert "run.seed: Field required" in capsys.readouterr().err
    path.write_text("# Results")
    assert main([str(path), "--readme", str(readme)]) == 1
    assert "of this version: Invalid JSON" in capsys.readouterr().err
    assert "old figures" in readme.read_text()
