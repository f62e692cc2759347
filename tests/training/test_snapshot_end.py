"""A run that ends, or goes on, while a snapshot is being written."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from attention.training.worker import StepPlan, StepReport
from experts.errors import ExpertError
from experts.training.step_hosts import StepLost
from model.snapshots.attempt import begin as begin_attempt
from model.snapshots.errors import SnapshotError
from model.snapshots.history import snapshots
from model.snapshots.manifest import Shard
from services.training import keeper as keeper_module
from services.training import run as run_module
from services.training.run import TooManySetbacks
from tests.training.small_run import small_run
from tests.training.test_run import STEPS, begin


@pytest.fixture
def data_file(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(small_run(checkpoint("mini"), tmp_path)["data"]["files"][0])


def test_a_snapshot_that_was_begun_when_a_run_ends_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file, batch_tokens=64)
    setup.run.train()
    root = tmp_path / "run" / "snapshots"
    before = sorted(root.iterdir())
    keeper = setup.run._keeper
    keeper.start(setup.run._client.hosts, STEPS, 0, {})
    assert len(list(root.iterdir())) == len(before) + 1
    keeper.close()
    assert sorted(root.iterdir()) == before == sorted(snapshots(root))
    assert keeper.finish() is None
    assert setup.told == []


def test_attempts_of_an_earlier_life_are_given_up(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path
) -> None:
    root = tmp_path / "run" / "snapshots"
    attempts = [begin_attempt(root, step) for step in (1, 4)]
    begin(checkpoint("mini"), tmp_path / "run", data_file, batch_tokens=64).run.train()
    assert not any(path.exists() for path in attempts)
    assert sorted(root.iterdir()) == sorted(snapshots(root))


def test_parameters_are_stepped_only_once_their_part_is_written(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file, batch_tokens=64)
    write, step = keeper_module.write_shard, setup.rig.optimizers[0].step
    writing, stepped_meanwhile = threading.Event(), []

    def slowly(staging: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Shard:
        writing.set()
        try:
            threading.Event().wait(0.05)
            return write(staging, name, tensors)
        finally:
            writing.clear()

    def watched(*given: float) -> None:
        stepped_meanwhile.append(writing.is_set())
        step(*given)

    monkeypatch.setattr(keeper_module, "write_shard", slowly)
    monkeypatch.setattr(setup.rig.optimizers[0], "step", watched)
    setup.run.train()
    assert stepped_meanwhile == [False] * STEPS


def test_older_snapshots_that_cannot_be_removed_are_told_of_and_cost_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(root: Path, keep: int) -> list[Path]:
        raise SnapshotError("step-00000002 cannot be removed: Device or resource busy")

    monkeypatch.setattr(keeper_module, "prune", busy)
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file, batch_tokens=64)
    assert setup.run.train() == STEPS
    assert len(snapshots(tmp_path / "run" / "snapshots")) == 3
    assert setup.told == ["older snapshots stay: step-00000002 cannot be removed: Device or resource busy"] * 3


def test_hosts_that_cannot_be_brought_back_end_the_run(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file, batch_tokens=64)

    def never(*given: object) -> None:
        raise ExpertError("host-1 has another model")

    monkeypatch.setattr(setup.run._coordinator, "restart", never)
    with pytest.raises(TooManySetbacks, match="the expert hosts cannot be brought back: host-1 has another model"):
        setup.run.train()
    assert setup.kept.losses == {}


def test_a_run_that_gets_on_may_lose_steps_again_and_again(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "MAX_SETBACKS", 1)
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file, batch_tokens=64)
    (worker,), lost = setup.rig.workers, {1, 3, 5}
    step = worker.step

    def lose(plan: StepPlan) -> StepReport:
        if plan.step in lost:
            lost.remove(plan.step)
            raise StepLost("host-1 is gone")
        return step(plan)

    monkeypatch.setattr(worker, "step", lose)
    assert setup.run.train() == STEPS
    assert setup.kept.resumes == [0, 0, 2, 4]
