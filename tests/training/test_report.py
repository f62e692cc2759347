"""What a run leaves for its reader, crashes and resumptions or not: records, loads of experts, TensorBoard's files."""

import errno
import json
import struct
from pathlib import Path

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from model.snapshots.errors import DiskFull
from services.training.metrics_file import MetricsFile, read_records
from services.training.records import StepRecord
from services.training.report import RunLog, RunLogError
from tests.training.step_records import EXPERTS, LAYERS, log_steps, record, rows, steps_in, total_rows

STEPS = 6


def written(directory: Path, steps: int = STEPS) -> bytes:
    """A log of that many steps, whose writer died."""
    log_steps(RunLog(directory, 0), 1, steps)
    return (directory / "metrics.jsonl").read_bytes()


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
    for cut in (*range(begin, len(raw) - 8, 9), *range(len(raw) - 8, len(raw) + 1)):
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


@pytest.mark.parametrize("step", [1, 3])
def test_only_the_last_step_is_a_checkpoint(tmp_path: Path, step: int) -> None:
    log = RunLog(tmp_path, 2)
    with pytest.raises(RunLogError, match=f"checkpoint of step {step} after step 2 was logged"):
        log.checkpoint(step)


def test_full_disk_is_told_by_the_name_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, 0)

    def full(self: MetricsFile, one: StepRecord) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsFile, "append", full)
    with pytest.raises(RunLogError, match=f"the log in {tmp_path} cannot be written: No space left on device"):
        log.append(record(1), rows(1))


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


def shown_losses(directory: Path) -> list[tuple[int, float]]:
    """As TensorBoard does it: a file after the other, and a session's start undoes that step and later ones."""
    shown: list[tuple[int, float]] = []
    for path in sorted((directory / "tensorboard").iterdir()):
        assert "tfevents" in path.name
        first, *rest = events(path)
        assert first.file_version == "brain.Event:2"
        for event in rest:
            if event.session_log.status == SessionLog.START:
                shown = [(step, loss) for step, loss in shown if step < event.step]
            shown += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "train/loss"]
    return shown


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    log_steps(RunLog(tmp_path, 0), 1, 6)
    log = RunLog(tmp_path, 4)
    for step in range(5, 9):
        log.append(record(step, loss=50.0 + step), rows(step))
    log = RunLog(tmp_path, 6)
    log.append(record(7, loss=90.0), rows(7))
    steps, losses = zip(*shown_losses(tmp_path), strict=True)
    assert steps == (1, 2, 3, 4, 5, 6, 7)
    assert losses == pytest.approx((4.0, 2.0, 4 / 3, 1.0, 55.0, 56.0, 90.0))


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
