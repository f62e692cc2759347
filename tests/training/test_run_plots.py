"""The plots of a run, read back from their SVG."""

import errno
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.training.curves import POINTS, curve, fits_log, smooth
from services.training.report import Drawn, RunLog
from services.training.run_plots import relative_load
from tests.training.step_records import EXPERTS, LAYERS, log_steps, record, steps_in, total_rows


def group(path: Path, name: str) -> list[str]:
    """Shapes of the SVG's group of that name."""
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    (found,) = [each for each in root.iter() if each.get("id") == name]
    return [each.get("d", "") for each in found.iter() if each.tag.endswith("path")]


def colours(path: Path, name: str) -> list[str]:
    root = ElementTree.parse(path).getroot()
    (found,) = [each for each in root.iter() if each.get("id") == name]
    styles = [each.get("style", "") for each in found.iter() if each.tag.endswith("path")]
    return [match[1] for style in styles if (match := re.search(r"fill: (#\w{6})", style))]


def words(path: Path) -> str:
    root = ElementTree.parse(path).getroot()
    return "\n".join("".join(each.itertext()) for each in root.iter() if each.tag.endswith("text"))


def channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("drawn")
    log = RunLog(directory, 0, range(1, LAYERS + 1))
    log_steps(log, 1, 40)
    assert log.close() == Drawn((directory / "loss.svg", directory / "experts.svg"))
    return directory


def test_loss_plot_has_a_point_for_each_step(drawn: Path) -> None:
    for name in ("loss", "loss-smoothed", "learning-rate"):
        (path,) = group(drawn / "loss.svg", name)
        xs = [x for x, _ in points(path)]
        assert len(xs) == 40, name
        assert np.diff(xs) == pytest.approx(np.full(39, xs[1] - xs[0]), abs=1e-4)
    assert {"Training loss and learning rate", "loss, nats a token", "step"} <= set(
        words(drawn / "loss.svg").split("\n")
    )


def test_loss_plot_is_logarithmic_where_the_loss_falls_far(drawn: Path) -> None:
    (path,) = group(drawn / "loss.svg", "loss")
    ys = [y for _, y in points(path)]  # the loss is 4 / step
    assert ys[1] - ys[0] == pytest.approx(ys[3] - ys[1], rel=1e-4)
    assert ys[1] > ys[0]


def test_load_plot_has_a_cell_for_each_expert(drawn: Path) -> None:
    assert len(colours(drawn / "experts.svg", "experts")) == LAYERS * EXPERTS
    said = words(drawn / "experts.svg")
    rows_LE = np.array(total_rows(list(range(1, 41))))
    largest = (rows_LE / rows_LE.mean(1, keepdims=True)).max()
    assert "Load of each expert, relative to the mean of its layer, over 40 steps" in said
    assert f"busiest: expert 7 of layer 1, {largest:.2f} times the mean" in said


def test_cells_are_coloured_by_their_share(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.append(record(1), torch.tensor([[5, 5, 5, 5], [0, 0, 0, 400], [0, 0, 0, 0]]))
    log.close()
    cells = colours(tmp_path / "experts.svg", "experts")
    even, none, busiest = cells[0], cells[4], cells[7]
    assert cells == [even] * 4 + [none] * 3 + [busiest] + [even] * 4
    assert min(channels(even)) > 0xF0  # pale: neither more nor less than the mean
    assert channels(busiest)[0] > 2 * channels(busiest)[2]
    assert channels(none)[2] > 2 * channels(none)[0]


def test_same_figures_give_the_same_plots(drawn: Path, tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, range(1, LAYERS + 1))
    log_steps(log, 1, 40)
    for path in log.draw().files:
        assert path.read_bytes() == (drawn / path.name).read_bytes()


def test_plots_cover_the_steps_before_the_resumption(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log_steps(log, 1, 12)
    log.checkpoint(12)
    log = RunLog(tmp_path, 12)
    log_steps(log, 13, 20)
    log.draw()
    assert len(points(group(tmp_path / "loss.svg", "loss")[0])) == 20
    assert "over 20 steps" in words(tmp_path / "experts.svg")


def test_one_step_can_be_seen(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log_steps(log, 1, 1)
    log.close()
    assert "over 1 step\n" in words(tmp_path / "experts.svg")
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    (line,) = [each for each in root.iter() if each.get("id") == "loss"]
    assert len([each for each in line.iter() if each.tag.endswith("use")]) == 1


def test_plots_leave_no_global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    log = RunLog(tmp_path, 0)
    log_steps(log, 1, 2)
    assert len(log.close().files) == 2
    assert matplotlib.rcParams["svg.fonttype"] == "path"


def test_missing_matplotlib_is_noted_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("matplotlib"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    log = RunLog(tmp_path, 0)
    log_steps(log, 1, 2)
    drawn = log.close()
    assert drawn.files == ()
    assert drawn.note is not None
    assert re.fullmatch(
        r"loss\.svg and experts\.svg were not drawn: .*matplotlib.*; `pip install matplotlib`; metrics\.jsonl has .*",
        drawn.note,
    )
    assert steps_in(tmp_path) == [1, 2]


def test_plots_on_a_full_disk_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, 0)
    log_steps(log, 1, 2)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("model.snapshots.disk.os.fsync", full)
    note = log.close().note
    assert note is not None
    assert "loss.svg cannot be written, the disk is full" in note


def test_run_without_a_step_has_no_plots(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new", 0)
    assert log.close() == Drawn((), "no plots were drawn: no step was made")
    assert log.close() == Drawn((), "no plots were drawn: no step was made")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80), st.integers(1, 30))
def test_smoothed_value_is_the_weighted_mean_of_those_before(values: list[float], span: int) -> None:
    kept = 1 - 2 / (span + 1)
    for end, smoothed in enumerate(smooth(np.array(values), span).tolist(), 1):
        weights = [kept ** (end - 1 - at) for at in range(end)]
        expected = np.average(values[:end], weights=weights)
        assert smoothed == pytest.approx(expected, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 3456])
def test_points_of_a_curve_stand_for_all_steps(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    drawn = curve(np.arange(1.0, count + 1), values)
    assert len(drawn.steps) == min(count, POINTS)
    assert drawn.steps[-1] == count
    first = 0
    for at, last in enumerate(drawn.steps.astype(int)):
        part = values[first:last]
        assert drawn.mean[at] == pytest.approx(part.mean())
        assert (drawn.low[at], drawn.high[at]) == (part.min(), part.max())
        first = last


@pytest.mark.parametrize(
    ("values", "log"), [([1, 10], True), ([1, 9.9], False), ([0, 100], False), ([-1, 100], False), ([0.1, 1, 2], True)]
)
def test_axis_is_logarithmic_where_that_shows_more(values: list[float], log: bool) -> None:
    assert fits_log(np.array(values, np.float64)) is log


def test_relative_load_of_a_layer_without_rows_is_even() -> None:
    share_LE = relative_load(np.array([[1, 3], [0, 0]]))
    assert share_LE.tolist() == [[0.5, 1.5], [1.0, 1.0]]
