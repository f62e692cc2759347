"""What a worker of Ray Train does with an end that no other life would change."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.snapshots.errors import DiskFull
from model.staging import NotWritten
from services.training import ray_loop
from services.training.driver import first_weights, preview, service_spec
from services.training.method import make_method
from services.training.outcome import Outcome, begin_outcome, read_outcome, write_outcome
from services.training.recipe import parse_recipe
from services.training.report import RunLogError
from services.training.trainer import plain
from tests.training.small_run import small_run


class Crowd:
    """Ranks of a run of two."""

    rank, world = 0, 2

    def gather(self, message: str) -> list[str]:
        return [message, ""]


@pytest.fixture
def config(checkpoint: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    recipe = parse_recipe(small_run(checkpoint("mini"), tmp_path) | {"workers": {"threads": 1}})
    _, _, steps = preview(recipe)
    recipe.output_dir.mkdir()
    return {
        "recipe": recipe.model_dump(mode="json"),
        "service": plain(service_spec(recipe, first_weights(recipe))),
        "steps": steps,
    }


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs that were begun, each of which finds that its log cannot be written."""
    begun: list[int] = []

    def run(*_: object) -> SimpleNamespace:
        def fail() -> None:
            begun.append(1)
            raise RunLogError("the log in out cannot be written: no room")

        return SimpleNamespace(run=fail)

    monkeypatch.setattr(ray_loop, "_WorkerRun", run)
    monkeypatch.setattr(ray_loop, "DistributedRanks", Crowd)
    return begun


def full(*_: object) -> None:
    raise DiskFull("no room")


def world(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(ray_loop.ray.train, "get_context", lambda: SimpleNamespace(get_world_size=lambda: size))


def test_a_log_that_cannot_be_written_ends_a_run_with_a_message(
    config: dict[str, Any], lives: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(monkeypatch, 1)
    ray_loop.train_worker(config)
    assert read_outcome(tmp_path / "out") == Outcome(failed="the log in out cannot be written: no room")


def test_with_other_workers_it_dies_of_it_and_no_later_life_tries_again(
    config: dict[str, Any], lives: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(monkeypatch, 2)
    with pytest.raises(RunLogError):
        ray_loop.train_worker(config)
    ray_loop.train_worker(config)
    assert len(lives) == 1
    begin_outcome(tmp_path / "out")  # by the command, when it is given again
    with pytest.raises(RunLogError):
        ray_loop.train_worker(config)


def test_a_run_that_had_ended_well_is_no_hindrance(
    config: dict[str, Any], lives: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_outcome(tmp_path / "out", Outcome(steps=2))
    world(monkeypatch, 1)
    ray_loop.train_worker(config)
    assert len(lives) == 1


def test_a_disk_without_room_for_the_outcome_dies_of_what_was_wrong_first(
    config: dict[str, Any], lives: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    world(monkeypatch, 1)
    monkeypatch.setattr(ray_loop, "write_outcome", full)
    with pytest.raises(RunLogError, match="the log in out cannot be written"):
        ray_loop.train_worker(config)


def test_a_result_that_cannot_be_written_ends_a_run_with_a_message(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise NotWritten(tmp_path / "out" / "model", "the disk is full")

    world(monkeypatch, 1)
    monkeypatch.setattr(ray_loop, "_WorkerRun", lambda *_: SimpleNamespace(run=fail))
    ray_loop.train_worker(config)
    assert read_outcome(tmp_path / "out") == Outcome(failed=f"{tmp_path}/out/model cannot be written: the disk is full")
    monkeypatch.setattr(ray_loop, "write_outcome", full)
    begin_outcome(tmp_path / "out")
    with pytest.raises(NotWritten):
        ray_loop.train_worker(config)


@pytest.mark.parametrize("method_name", ["full", "lora"])
def test_a_run_that_begins_again_has_its_first_values(
    checkpoint: Callable[[str], Path], tmp_path: Path, method_name: str
) -> None:
    recipe = parse_recipe(small_run(checkpoint("mini"), tmp_path) | {"method": method_name})
    run = ray_loop._WorkerRun.__new__(ray_loop._WorkerRun)
    run._recipe, run._checkpoint, run._device = recipe, first_weights(recipe), "cpu"
    method = make_method(recipe, run._checkpoint.config, "run")
    dense, first = run._dense(method), run._first_values(method)
    began = {name: trained.value.detach().clone() for name, trained in dense.trained.items()}
    with torch.no_grad():
        for trained in dense.trained.values():
            trained.value += 1.0  # steps
    dense.restore(first)
    assert began
    assert all(torch.equal(dense.trained[name].value, value) for name, value in began.items())
