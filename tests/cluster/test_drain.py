"""A worker that is to end finishes what is nearly done, and then leaves; a service that cannot start keeps its logs."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster import attention_worker
from cluster.attention_worker import DRAIN_S, AttentionWorker
from cluster.session import LocalCluster


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(attention_worker, "time", made)
    return made


class Engine:
    """Busy until a moment, and alive until another."""

    def __init__(self, clock: Clock, done: list[str], busy_s: float, alive_s: float = 1e9) -> None:
        self._clock, self._done = clock, done
        self._idle_at_s, self._dead_at_s = clock.now_s + busy_s, clock.now_s + alive_s

    @property
    def busy(self) -> bool:
        return self._clock.now_s < self._idle_at_s

    @property
    def alive(self) -> bool:
        return self._clock.now_s < self._dead_at_s

    def close(self) -> None:
        self._done.append("engine")


def close(monkeypatch: pytest.MonkeyPatch, done: list[str], engine: Engine, leaves: Any = None) -> None:
    """Have a worker close; `done` has what it did, in turn."""
    worker: Any = object.__new__(AttentionWorker)
    worker._id, worker._namespace, worker._engine = "attention-a", "shoal-p1", engine
    worker._leaving = SimpleNamespace(set=lambda: done.append("leaving"))
    worker._beat_now = SimpleNamespace(set=lambda: done.append("beat"))
    worker._server = SimpleNamespace(stop=lambda grace_s: done.append("server"))
    worker._transport = SimpleNamespace(close=lambda: done.append("transport"))
    worker._placements = SimpleNamespace(close=lambda: done.append("placements"))

    def leave(worker_id: str) -> str:
        done.append(f"{worker_id} left")
        if leaves is not None:
            raise leaves
        return "a reference"

    controller = SimpleNamespace(leave=SimpleNamespace(remote=leave))
    monkeypatch.setattr(attention_worker, "find_controller", lambda namespace: controller)
    monkeypatch.setattr(attention_worker.ray, "get", lambda reference, timeout: None)
    worker.close()


EVERYTHING = ["leaving", "beat", "attention-a left", "server", "engine", "transport", "placements"]


@pytest.mark.parametrize(
    ("busy_s", "alive_s", "waited_s"),
    [
        (0.0, 1e9, 0.0),
        (0.5, 1e9, 0.5),  # for what is nearly done
        (60.0, 1e9, DRAIN_S),  # and no longer
        (60.0, 0.3, 0.3),  # a dead engine finishes nothing
    ],
)
def test_a_worker_that_is_to_end_waits_for_what_is_nearly_done(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, busy_s: float, alive_s: float, waited_s: float
) -> None:
    done: list[str] = []
    close(monkeypatch, done, Engine(clock, done, busy_s, alive_s))
    assert clock.now_s - 100.0 == pytest.approx(waited_s, abs=0.05)
    assert done == EVERYTHING


@pytest.mark.parametrize("gone", [ValueError("no controller"), RayActorError()])
def test_a_worker_whose_controller_is_gone_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, gone: Exception
) -> None:
    done: list[str] = []
    close(monkeypatch, done, Engine(clock, done, 0.0), gone)
    assert done == EVERYTHING


def ray_that_wrote(logs: Path) -> LocalCluster:
    made = object.__new__(LocalCluster)
    made.logs = logs
    return made


def test_what_a_ray_wrote_is_kept_in_place_of_what_was_there(tmp_path: Path) -> None:
    logs, target = tmp_path / "session" / "logs", tmp_path / "kept"
    (logs / "old").mkdir(parents=True)
    (logs / "raylet.out").write_text("it did not start")
    (logs / "gone").symlink_to(tmp_path / "nowhere")
    target.mkdir()
    (target / "of-an-earlier-start").write_text("x")
    assert ray_that_wrote(logs).keep_logs(target) == target
    shutil.rmtree(tmp_path / "session")
    assert sorted(path.name for path in target.iterdir()) == ["old", "raylet.out"]
    assert (target / "raylet.out").read_text() == "it did not start"


def test_logs_of_which_some_were_kept_are_told_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs, target = tmp_path / "logs", tmp_path / "kept"
    assert ray_that_wrote(logs).keep_logs(target) is None

    def full(source: Path, into: Path, **options: object) -> None:
        into.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    assert ray_that_wrote(logs).keep_logs(target) == target
