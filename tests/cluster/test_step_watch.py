"""A step that hangs is told from one that is slow, or waits for its experts."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from attention.requests import Update
from attention.runner import EngineThread
from cluster.attention_worker import AttentionWorker
from cluster.step_watch import STAND_S, StepWatch
from tests.end_to_end.clients import wait_until

DEADLINE_S = 30.0
LAYERS = 59


def test_a_step_may_wait_for_the_experts_of_every_layer_as_long_as_they_may_take() -> None:
    watch = StepWatch(DEADLINE_S)
    stood_s = [watch.stands_s(DEADLINE_S * layer, layer, DEADLINE_S * layer) for layer in range(LAYERS)]
    assert max(stood_s) < watch.longest_s


def test_a_step_that_stays_at_a_layer_hangs() -> None:
    watch = StepWatch(DEADLINE_S)
    assert watch.longest_s > 2 * DEADLINE_S
    assert watch.stands_s(5.0, 7, 100.0) == 0.0  # it may have come there just now
    assert watch.stands_s(5.0 + watch.longest_s, 7, 100.0 + watch.longest_s) == watch.longest_s
    assert watch.stands_s(6.0 + watch.longest_s, 8, 101.0 + watch.longest_s) == 0.0


def test_between_two_steps_nothing_hangs() -> None:
    watch = StepWatch(DEADLINE_S)
    watch.stands_s(None, 7, 0.0)
    assert watch.stands_s(None, 7, 1e6) == 0.0
    assert watch.stands_s(2.0, 7, 1e6 + 3.0) == 2.0  # the next one has only begun


class HangingEngine:
    """Its step waits until it is let go."""

    max_length = 8

    def __init__(self) -> None:
        self.has_work = True
        self.go_on = threading.Event()

    def step(self) -> list[Update]:
        self.go_on.wait(10)
        self.has_work = False
        return []


def test_a_worker_whose_step_hangs_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = HangingEngine()
    worker = object.__new__(AttentionWorker)
    worker._id = "attention-a"
    client: Any = SimpleNamespace(stats=lambda: SimpleNamespace(dispatches=3))
    worker._client = client
    worker._step_watch = StepWatch(DEADLINE_S)
    worker._engine = EngineThread(engine)
    try:
        wait_until(lambda: worker._engine.step_age_s() is not None, 5)
        worker.check_health()
        began_s = time.monotonic()
        later: Any = SimpleNamespace(monotonic=lambda: began_s + DEADLINE_S + STAND_S - 1.0)
        for module in ("cluster.attention_worker.time", "attention.runner.time"):
            monkeypatch.setattr(module, later)
        worker.check_health()
        later.monotonic = lambda: began_s + DEADLINE_S + STAND_S + 1.0
        with pytest.raises(RuntimeError, match="a step of attention-a has not got on for 331 s"):
            worker.check_health()
        engine.go_on.set()
        wait_until(lambda: worker._engine.step_age_s() is None, 5)
        worker.check_health()
    finally:
        engine.go_on.set()
        worker._engine.close()
    with pytest.raises(RuntimeError, match="has stopped"):
        worker.check_health()
