"""A run of several workers: its snapshots have the dense side's moments in parts, and any number of workers goes on."""

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from model.snapshots.errors import DiskFull
from model.snapshots.history import snapshots
from model.snapshots.manifest import Shard
from model.snapshots.snapshot import Snapshot
from services.training import keeper as keeper_module
from services.training.identity import Identity
from services.training.inputs import load_data
from services.training.keeper import Keeper
from services.training.recipe import parse_recipe
from services.training.run import Run
from tests.training.rig import Rig, make_rig
from tests.training.small_run import small_run
from tests.training.test_run import Kept
from tests.training.test_steps import same, weights

STEPS = 6
CONTEXT = {"batch_tokens": 160, "steps": STEPS, "lr": 1e-3, "snapshots": {"every_steps": 2}}


@dataclass
class Whole:
    """A run that has come to its end."""

    rig: Rig
    kept: Kept
    told: list[str]
    out: Path


def train(model: Path, place: Path, out: str, workers: int, after: Path | None = None) -> Whole:
    """All workers' loops, each in a thread; from the snapshot `after`, where one is given."""
    recipe = parse_recipe(small_run(model, place) | CONTEXT | {"output_dir": str(place / out)})
    rig = make_rig(model, 2, workers=workers, clip=1.0)
    root = recipe.output_dir / "snapshots"
    if after is not None:
        shutil.copytree(after, root / after.name)
    data, kept, told = load_data(recipe), Kept(), list[str]()
    identity = Identity(recipe.model_dump(mode="json"), data.fingerprint(), "f")
    runs: list[Run] = []
    for worker, dense, optimizer, client in zip(rig.workers, rig.denses, rig.optimizers, rig.clients, strict=True):
        ranks, coordinator = worker._ranks, worker._coordinator
        keeper = Keeper(root, 10, "run", identity, ranks, dense, optimizer, coordinator, told.append)
        worker._before_dense_step = keeper.settle
        first = {name: trained.value.detach().clone() for name, trained in dense.trained.items()}

        def reset(rank: int = ranks.rank, first: Mapping[str, torch.Tensor] = first) -> None:
            rig.denses[rank].restore(first.__getitem__)
            rig.optimizers[rank].reset()

        records = kept if ranks.rank == 0 else None
        rest = (lambda: False, told.append)
        runs.append(
            Run(recipe, STEPS, data, ranks, worker, client, keeper, rig.table, coordinator, reset, records, *rest)
        )
    steps: list[int] = []
    threads = [threading.Thread(target=lambda run=run: steps.append(run.train())) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert steps == [STEPS] * workers
    return Whole(rig, kept, told, root)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def wholes(checkpoint: Callable[[str], Path], place: Path) -> dict[int, Whole]:
    """Undisturbed runs, by how many workers they have."""
    return {workers: train(checkpoint("mini"), place, f"whole-{workers}", workers) for workers in (1, 2, 3)}


def test_each_worker_has_the_moments_of_its_own_part_and_writes_them(wholes: dict[int, Whole]) -> None:
    whole = wholes[2]
    parts = [set(optimizer.moments()) for optimizer in whole.rig.optimizers]
    assert parts[0]
    assert parts[1]
    assert not parts[0] & parts[1]
    for optimizer, dense, names in zip(whole.rig.optimizers, whole.rig.denses, parts, strict=True):
        held = {name for name, trained in dense.trained.items() if trained.mean is not None}
        assert {f"{name}.{moment}" for name in held for moment in ("mean", "square")} == names
        assert set(optimizer.wanted()) == names
    shards = {shard.name: set(shard.tensors) for shard in Snapshot.open(snapshots(whole.out)[0]).manifest.shards}
    assert [parts[rank] - shards[f"dense-{rank}.safetensors"] for rank in range(2)] == [set(), set()]
    assert not shards["dense-0.safetensors"] & shards["dense-1.safetensors"]


def test_all_workers_have_the_same_weights_and_the_same_bits_when_it_is_done_again(
    checkpoint: Callable[[str], Path], place: Path, wholes: dict[int, Whole]
) -> None:
    again, whole = train(checkpoint("mini"), place, "again", 2), wholes[2]
    assert again.kept.losses == whole.kept.losses
    assert same(weights(again.rig), weights(whole.rig))
    for name, tensor in whole.rig.denses[0].values():
        assert torch.equal(tensor, whole.rig.denses[1][name])


@pytest.mark.parametrize("step", [2, 4])
def test_as_many_workers_go_on_to_the_same_bits(
    checkpoint: Callable[[str], Path], place: Path, wholes: dict[int, Whole], step: int
) -> None:
    whole = wholes[2]
    resumed = train(checkpoint("mini"), place, f"from-{step}", 2, whole.out / f"step-{step:08}")
    assert resumed.kept.resumes == [step]
    assert resumed.kept.losses == {made: whole.kept.losses[made] for made in range(step + 1, STEPS + 1)}
    assert same(weights(resumed.rig), weights(whole.rig))


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_other_numbers_of_workers_go_on_with_the_same_curve_and_the_same_samples(
    checkpoint: Callable[[str], Path], place: Path, wholes: dict[int, Whole], before: int, now: int
) -> None:
    whole = wholes[before]
    resumed = train(checkpoint("mini"), place, f"{before}-to-{now}", now, whole.out / "step-00000002")
    assert resumed.kept.resumes == [2]
    expected = [whole.kept.losses[step] for step in range(3, STEPS + 1)]
    assert list(resumed.kept.losses.values()) == pytest.approx(expected, rel=1e-5)
    assert resumed.kept.epochs == whole.kept.epochs[2:]
    assert resumed.kept.epochs[-1] > 1


def test_a_disk_that_is_full_for_one_of_them_costs_a_snapshot_and_nothing_else(
    checkpoint: Callable[[str], Path], place: Path, wholes: dict[int, Whole], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = keeper_module.write_shard

    def full(staging: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Shard:
        if "step-00000004" in staging.name and name == "dense-1.safetensors":
            raise DiskFull(f"{staging / name}: no room")
        return write(staging, name, tensors)

    monkeypatch.setattr(keeper_module, "write_shard", full)
    run = train(checkpoint("mini"), place, "full", 2)
    assert [path.name for path in snapshots(run.out)] == ["step-00000006", "step-00000002"]
    (said,) = run.told
    assert said.startswith("no snapshot of step 4: ")
    assert run.kept.losses == wholes[2].kept.losses
