"""What worker 0 writes of a step is what the step reported."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention.training.worker import StepReport
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from services.training.metrics_file import read_records
from services.training.records import METRICS, StepRecord
from services.training.report import Drawn, RunLog, RunLogError
from services.training.run import Made
from services.training.run_records import RunRecords


@pytest.fixture
def config(checkpoint: Callable[[str], Path]) -> ModelConfig:
    return Checkpoint.open(checkpoint("mini")).config


def made(steps: int, config: ModelConfig, slots: int = 400) -> Made:
    """A step whose figures all differ; expert 0 of each layer has three times its share, then twice."""
    experts = config.n_routed_experts
    rows_LE = torch.full((len(config.moe_layers), experts), 100)
    for place, times in enumerate((3, 2)):
        rows_LE[place] = 100 * (experts - times)
        rows_LE[place, 0] = 100 * times * (experts - 1)
    report = StepReport(
        step=steps - 1,
        loss=2.5,
        balance=0.125,
        grad_norm=0.75,
        dropped=50,
        slots=slots,
        rows_LE=rows_LE,
        hosts_lost=("host-1",),
    )
    return Made(
        steps=steps, report=report, learning_rate=1e-4, tokens=600, targets=500, seconds=1.5, epoch=0.25, hosts=3
    )


def test_a_record_has_the_steps_figures(config: ModelConfig, tmp_path: Path) -> None:
    records = RunRecords(tmp_path, config, 2, pytest.fail)
    records.resumed(0)
    records.made(made(1, config))
    assert read_records(tmp_path / METRICS) == [
        StepRecord(
            step=1,
            loss=2.5,
            balance=0.125,
            lr=1e-4,
            tokens=600,
            targets=500,
            grad_norm=0.75,
            dropped=0.125,
            tokens_per_s=400.0,
            seconds=1.5,
            epoch=0.25,
            imbalance=2.5,
            hosts_lost=("host-1",),
            workers=2,
            hosts=3,
        )
    ]


def test_a_step_without_slots_dropped_none(config: ModelConfig, tmp_path: Path) -> None:
    records = RunRecords(tmp_path, config, 1, pytest.fail)
    records.resumed(0)
    records.made(made(1, config, slots=0))
    (record,) = read_records(tmp_path / METRICS)
    assert record.dropped == 0.0


def test_steps_that_are_made_again_are_recorded_once(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[RunLog] = []
    monkeypatch.setattr(RunLog, "draw", lambda log: drawn.append(log) or Drawn(()))
    records = RunRecords(tmp_path, config, 1, pytest.fail)
    records.resumed(0)
    for steps in (1, 2, 3):
        records.made(made(steps, config))
        if steps == 2:
            records.keeping(steps)
    assert drawn == []
    records.resumed(2)
    assert len(drawn) == 1  # the log so far was closed
    for steps in (3, 4):
        records.made(made(steps, config))
    assert [record.step for record in read_records(tmp_path / METRICS)] == [1, 2, 3, 4]
    with pytest.raises(RunLogError, match="step 4 is logged after step 4"):
        records.made(made(4, config))
    with pytest.raises(RunLogError, match="checkpoint of step 3 after step 4"):
        records.keeping(3)


def test_a_file_that_is_no_log_is_named_as_the_logs_fault(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("a shopping list\nand more\n")
    with pytest.raises(RunLogError):
        RunRecords(tmp_path, config, 1, pytest.fail).resumed(0)


def test_what_hinders_the_plots_is_told_once(config: ModelConfig, tmp_path: Path) -> None:
    told: list[str] = []
    records = RunRecords(tmp_path, config, 1, told.append)
    records.close()  # before it was begun
    records.resumed(0)
    records.close()
    records.close()
    assert told == ["no plots were drawn: no step was made"]
