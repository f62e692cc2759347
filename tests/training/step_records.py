"""Records and loads of training steps that differ from each other, as they do in a run."""

import json
from pathlib import Path
from typing import Any

import torch

from services.training.records import StepRecord
from services.training.report import RunLog

LAYERS, EXPERTS = 3, 8


def record(step: int, **changes: Any) -> StepRecord:
    made: dict[str, Any] = {
        "step": step,
        "loss": 4.0 / step,
        "balance": 0.003,
        "lr": 1e-4,
        "tokens": 4096,
        "targets": 4000,
        "grad_norm": 1.25,
        "dropped": 0.015,
        "tokens_per_s": 1000.0,
        "seconds": 4.096,
        "epoch": step / 8,
        "imbalance": 1.5,
        "hosts_lost": (),
        "workers": 1,
        "hosts": 4,
    }
    return StepRecord(**made | changes)


def rows(step: int) -> torch.Tensor:
    """Of one step; all steps and experts have other ones."""
    return torch.arange(LAYERS * EXPERTS).reshape(LAYERS, EXPERTS) * step + 1


def total_rows(steps: list[int]) -> list[list[int]]:
    return torch.stack([rows(step) for step in steps]).sum(0).tolist()


def log_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.append(record(step), rows(step))


def steps_in(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
