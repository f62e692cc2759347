"""What a run leaves for its reader: records, loads of the experts, TensorBoard's files, plots."""

import errno
import json
import math
import re
import struct
import sys
from dataclasses import fields, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from model.snapshots.errors import DiskFull
from services.training.curves import POINTS, curve, fits_log, smooth
from services.training.metrics_file import MetricsFile, read_records
from services.training.records import StepRecord
from services.training.report import Drawn, RunLog, RunLogError
from services.training.run_plots import relative_load
from tests.training.step_records import record

LAYERS, EXPERTS = 3, 8
STEPS = 6
FLOATS = [field.name for field in fields(StepRecord) if field.type is float]
COUNTS = [field.name for field in fields(StepRecord) if field.type is int]


def rows(step: int) -> torch.Tensor:
    """Of one step; all steps and experts have other ones."""
    return torch.arange(LAYERS * EXPERTS).reshape(LAYERS, EXPERTS) * step + 1


def total_rows(steps: list[int]) -> list[list[int]]:
    return torch.stack([rows(step) for step in steps]).sum(0).tolist()


def log_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.append(record(step), rows(step))


def written(directory: Path, steps: int = STEPS) -> bytes:
    """A log of that many steps, whose writer died."""
    log_steps(RunLog(directory, 0), 1, steps)
    return (directory / "metrics.jsonl").read_bytes()


def steps_in(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


# records


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    floats=st.lists(finite, min_size=len(FLOATS), max_size=len(FLOATS)),
    counts=st.lists(st.integers(1, 2**60), min_size=len(COUNTS), max_size=len(COUNTS)),
    hosts=st.lists(st.text()),
)
def test_record_survives_its_line(floats: list[float], counts: list[int], hosts: list[str]) -> None:
    values = dict(zip(FLOATS + COUNTS, [*floats, *counts], strict=True))
    one = StepRecord(**values, hosts_lost=tuple(hosts))
    line = one.to_json()
    assert "\n" not in line
    assert StepRecord.from_json(line.encode()) == one


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} of a training step is .*expected a finite number"):
        record(1, **{name: value})


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_finite_number_is_refused_in_a_line(text: str) -> None:
    line = record(1, loss=123.5).to_json().replace("123.5", text)
    with pytest.raises(ValueError, match="loss of a training step"):
        StepRecord.from_json(line)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 0),
        ("step", 1.0),
        ("step", True),
        ("tokens", -1),
        ("hosts", "4"),
        ("loss", "1"),
        ("loss", None),
        ("loss", False),
        ("loss", 10**400),
        ("hosts_lost", "e1"),
        ("hosts_lost", (1,)),
    ],
)
def test_value_of_another_kind_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} of a training step is"):
        record(1, **{name: value})


@pytest.mark.parametrize("line", ["", "{}", "[1]", "null", '{"step": 1}', "{", '{"step": 1, "loss": 2', "\ufeff{}"])
def test_line_that_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        StepRecord.from_json(line)


def test_line_with_a_field_more_is_refused() -> None:
    document = json.loads(record(1).to_json())
    with pytest.raises(ValueError, match="is no step's record"):
        StepRecord.from_json(json.dumps(document | {"more": 1}))


# the file of records


def test_each_step_is_on_its_line_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for step in range(1, STEPS + 1):
        log.append(record(step), rows(step))
        lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        assert [StepRecord.from_json(line) for line in lines] == [record(each) for each in range(1, step + 1)]
        assert lines[-1].endswith(b"\n")


@pytest.mark.parametrize("resumed_at", range(STEPS + 1))
def test_resumed_run_keeps_exactly_the_records_up_to_its_step(tmp_path: Path, resumed_at: int) -> None:
    lines = written(tmp_path).splitlines(keepends=True)
    log = RunLog(tmp_path, resumed_at)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:resumed_at])
    again = record(resumed_at + 1, loss=77.0)
    log.append(again, rows(1))
    assert read_records(tmp_path / "metrics.jsonl")[-1] == again
    assert steps_in(tmp_path) == list(range(1, resumed_at + 2))


def test_crash_in_the_midst_of_a_line_loses_that_line_alone(tmp_path: Path) -> None:
    raw = written(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    begin = raw.rindex(b"\n", 0, -1) + 1
    for cut in range(begin, len(raw) + 1):
        path.write_bytes(raw[:cut])
        MetricsFile(path, 3).close()
        whole = cut >= len(raw) - 1
        assert path.read_bytes() == (raw if whole else raw[:begin]), cut


def test_zeros_that_a_power_cut_leaves_are_dropped(tmp_path: Path) -> None:
    raw = written(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    for tail in (b"\0" * 100, raw[:20] + b"\0" * 100):
        path.write_bytes(raw + tail)
        MetricsFile(path, 3).close()
        assert path.read_bytes() == raw


@pytest.mark.parametrize("content", ["not ours", "{}\n", '[{"loss": 1}]', "\0\0\n", '{"step": 1, "loss"\n'])
def test_file_of_something_else_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    raw = (record(1).to_json() + "\n" + content).encode()
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{path}, line 2, is no record of a step .*: mend it, or move the file away"):
        RunLog(tmp_path, 0)
    assert path.read_bytes() == raw


def test_cut_that_fails_leaves_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = written(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("model.snapshots.disk.os.fsync", full)
    with pytest.raises(DiskFull, match=r"metrics\.jsonl cannot be written"):
        RunLog(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == raw
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_writer_of_an_earlier_life_is_not_read(tmp_path: Path) -> None:
    before = RunLog(tmp_path, 0)
    log_steps(before, 1, 3)
    log = RunLog(tmp_path, 3)
    before.append(record(4, loss=99.0), rows(4))
    log_steps(log, 4, 5)
    assert [each.loss for each in read_records(tmp_path / "metrics.jsonl")] == [4.0 / step for step in range(1, 6)]


@pytest.mark.parametrize("step", [1, 2, 4])
def test_only_the_next_step_is_logged(tmp_path: Path, step: int) -> None:
    log = RunLog(tmp_path, 2)
    with pytest.raises(RunLogError, match=f"step {step} is logged after step 2; expected 3"):
        log.append(record(step), rows(step))
    with pytest.raises(RunLogError, match=f"checkpoint of step {step} after step 2") if step != 2 else nothing():
        log.checkpoint(step)


def nothing() -> "pytest.RaisesExc[BaseException]":
    import contextlib

    return contextlib.nullcontext()  # type: ignore[return-value]


def test_full_disk_is_told_by_the_name_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, 0)

    def full(self: MetricsFile, one: StepRecord) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsFile, "append", full)
    with pytest.raises(RunLogError, match=f"the log in {tmp_path} cannot be written: No space left on device"):
        log.append(record(1), rows(1))


# loads of the experts


def final_loads(directory: Path, log: RunLog, step: int) -> tuple[int, list[list[int]]]:
    log.checkpoint(step)
    newest = json.loads((directory / "loads.json").read_text())["checkpoints"][str(step)]
    return newest["steps"], newest["rows"]


def test_loads_are_those_of_the_steps_that_count(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log_steps(log, 1, 2)
    log.checkpoint(2)
    log_steps(log, 3, 4)
    log.checkpoint(4)
    log_steps(log, 5, 6)
    log = RunLog(tmp_path, 4)  # steps 5 and 6 are lost
    log_steps(log, 5, 5)
    assert final_loads(tmp_path, log, 5) == (5, total_rows([1, 2, 3, 4, 5]))
    log = RunLog(tmp_path, 2)  # the snapshot of step 4 is damaged
    log_steps(log, 3, 3)
    assert final_loads(tmp_path, log, 3) == (3, total_rows([1, 2, 3]))
    assert set(json.loads((tmp_path / "loads.json").read_text())["checkpoints"]) == {"2", "3"}


def test_loads_say_how_many_steps_they_are_of_where_some_are_missing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log_steps(log, 1, 2)
    log.checkpoint(2)
    log_steps(log, 3, 4)
    log = RunLog(tmp_path, 4)
    log_steps(log, 5, 5)
    assert final_loads(tmp_path, log, 5) == (3, total_rows([1, 2, 5]))


def test_newest_checkpoints_of_loads_are_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for step in range(1, 13):
        log_steps(log, step, step)
        log.checkpoint(step)
    kept = json.loads((tmp_path / "loads.json").read_text())["checkpoints"]
    assert [int(step) for step in kept] == list(range(5, 13))
    assert kept["7"] == {"steps": 7, "rows": total_rows(list(range(1, 8)))}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"checkpoints": []}',
        '{"checkpoints": {"a": {"steps": 1, "rows": [[1]]}}}',
        '{"checkpoints": {"1": {"steps": 1, "rows": [[1], [1, 2]]}}}',
        '{"checkpoints": {"1": {"steps": 1, "rows": [[0.5]]}}}',
        '{"checkpoints": {"1": {"steps": 1, "rows": [[-1]]}}}',
        '{"checkpoints": {"1": {"rows": [[1]]}}}',
    ],
)
def test_loads_of_something_else_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "loads.json").write_text(content)
    with pytest.raises(ValueError, match=r"loads\.json is no count of the experts' loads .*: remove it"):
        RunLog(tmp_path, 1)


def test_rows_of_another_model_are_refused(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, range(1, LAYERS + 1))
    log_steps(log, 1, 1)
    log.checkpoint(1)
    with pytest.raises(ValueError, match=r"\[3, 9\] layers and experts, .*of \[3, 8\]"):
        log.append(record(2), torch.ones(LAYERS, EXPERTS + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows are of 2 layers; expected 3"):
        log.append(record(2), rows(2)[:2])
    with pytest.raises(ValueError, match="rows are float32"):
        log.append(record(2), rows(2).float())
    log_steps(log, 2, 2)
    assert final_loads(tmp_path, log, 2) == (2, total_rows([1, 2]))


# TensorBoard's files


def crc32c(data: bytes) -> int:
    """Bit by bit, as the polynomial says."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def check_crc(data: bytes, stored: bytes) -> None:
    crc = crc32c(data)
    assert struct.unpack("<I", stored)[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(path: Path) -> list[Event]:
    raw, found = path.read_bytes(), []
    while raw:
        (length,) = struct.unpack("<Q", raw[:8])
        check_crc(raw[:8], raw[8:12])
        check_crc(raw[12 : 12 + length], raw[12 + length : 16 + length])
        found.append(Event.FromString(raw[12 : 12 + length]))
        raw = raw[16 + length :]
    return found


def shown_losses(directory: Path) -> dict[int, float]:
    """As TensorBoard does it: a file after the other, and a session's start undoes that step and later ones."""
    shown: dict[int, float] = {}
    for path in sorted((directory / "tensorboard").iterdir()):
        assert "tfevents" in path.name
        first, *rest = events(path)
        assert first.file_version == "brain.Event:2"
        for event in rest:
            if event.session_log.status == SessionLog.START:
                shown = {step: loss for step, loss in shown.items() if step < event.step}
            shown |= {event.step: value.simple_value for value in event.summary.value if value.tag == "train/loss"}
    return shown


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    log_steps(RunLog(tmp_path, 0), 1, 6)
    log = RunLog(tmp_path, 4)
    for step in range(5, 9):
        log.append(record(step, loss=50.0 + step), rows(step))
    log = RunLog(tmp_path, 6)
    log.append(record(7, loss=90.0), rows(7))
    expected = {1: 4.0, 2: 2.0, 3: 4 / 3, 4: 1.0, 5: 55.0, 6: 56.0, 7: 90.0}
    assert shown_losses(tmp_path) == pytest.approx(expected)


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    one = record(1, loss=3.5, balance=0.25, lr=0.5, grad_norm=7.0, dropped=0.125, imbalance=1.75, hosts=5, workers=2)
    RunLog(tmp_path, 0).append(one, rows(1))
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = {value.tag: value.simple_value for value in events(path)[-1].summary.value}
    assert values == {
        "train/loss": 3.5,
        "train/learning_rate": 0.5,
        "train/gradient_norm": 7.0,
        "train/epoch": 0.125,
        "train/tokens": 4096,
        "train/tokens_per_s": 1000.0,
        "experts/balance_loss": 0.25,
        "experts/imbalance": 1.75,
        "experts/dropped": 0.125,
        "cluster/hosts": 5,
        "cluster/workers": 2,
    }


# plots


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
    assert {"Training loss and learning rate", "loss, nats a token", "step"} <= set(words(drawn / "loss.svg").split("\n"))


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
    red, _, blue = (int(busiest[at : at + 2], 16) for at in (1, 3, 5))
    assert red > blue
    assert len({even, none, busiest}) == 3


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
    before = dict(matplotlib.rcParams)
    log = RunLog(tmp_path, 0)
    log_steps(log, 1, 2)
    assert len(log.close().files) == 2
    assert dict(matplotlib.rcParams) == before


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


# curves


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


def test_a_record_is_not_changed_by_its_copy() -> None:
    assert replace(record(1), loss=2.0) != record(1)
