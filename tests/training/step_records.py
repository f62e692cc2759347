"""Records of training steps that differ from each other, as they do in a run."""

from typing import Any

from services.training.records import StepRecord


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
