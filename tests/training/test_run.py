"""The loop of a run: resumed, rolled back or on other hosts, it has the same curve, and sees each sample once."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from attention.training.parameters import DenseParameters
from attention.training.ranks import OneRank
from attention.training.worker import NotFinite, StepPlan, StepReport
from experts.training.host import TrainingHost
from experts.training.step_hosts import StepHosts
from model.checkpoint import Checkpoint
from model.snapshots.errors import DiskFull, SnapshotError
from model.snapshots.history import snapshots
from model.snapshots.manifest import Shard
from model.snapshots.snapshot import Snapshot
from services.training import keeper as keeper_module
from services.training.identity import Identity
from services.training.inputs import load_data
from services.training.keeper import Keeper
from services.training.method import make_method
from services.training.recipe import Recipe, parse_recipe
from services.training.run import Made, Run, TooManySetbacks
from tests.training.rig import Rig, make_rig
from tests.training.test_steps import come_back, same, strike, weights

STEPS = 6
CHOSEN = ((1, 2), (2, 5))  # experts, for ESFT


@dataclass
class Kept:
    """Records in memory."""

    losses: dict[int, float] = field(default_factory=dict)
    epochs: list[float] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)
    after: Callable[[int], None] | None = None
    full_at: int | None = None

    def made(self, made: Made) -> None:
        self.losses[made.steps] = made.report.loss
        self.epochs.append(made.epoch)
        if self.after is not None:
            self.after(made.steps)

    def resumed(self, steps: int) -> None:
        self.resumes.append(steps)

    def keeping(self, steps: int) -> None:
        if steps == self.full_at:
            raise DiskFull("no room for records")


@dataclass
class Setup:
    """A run that can be begun again."""

    recipe: Recipe
    rig: Rig
    run: Run
    kept: Kept
    told: list[str]


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    records = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": f"{n} and {n * 7 % 10}"},
            ]
        }
        for n in range(23)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def begin(
    model: Path,
    out: Path,
    data_file: Path,
    hosts: int = 2,
    replicas: int = 1,
    fingerprint: str = "f",
    first_fingerprint: str = "",
    **given: object,
) -> Setup:
    raw = {
        "model": str(model),
        "output_dir": str(out),
        "data": {"files": [str(data_file)], "sequence_length": 64},
        "steps": STEPS,
        "batch_tokens": 160,
        "micro_batch_tokens": 64,
        "lr": 1e-3,
        "snapshots": {"every_steps": 2, "keep": 10},
        **given,
    }
    recipe = parse_recipe(raw)
    method = make_method(recipe, Checkpoint.open(model).config, "run", CHOSEN)
    rig = make_rig(
        model,
        hosts,
        replicas,
        training=method.experts,
        clip=1.0,
        make_dense=lambda checkpoint: DenseParameters.load(
            checkpoint, method.trains_dense, method.factors, method.scale
        ),
    )
    data = load_data(recipe)
    told: list[str] = []
    coordinator = rig.workers[0]._coordinator
    assert coordinator is not None
    keeper = Keeper(
        out / "snapshots",
        10,
        "run",
        Identity(recipe.model_dump(mode="json"), data.fingerprint(), fingerprint, first_fingerprint),
        OneRank(),
        rig.denses[0],
        rig.optimizers[0],
        coordinator,
        told.append,
    )
    rig.workers[0]._before_dense_step = keeper.settle
    kept = Kept()
    first = {name: trained.value.detach().clone() for name, trained in rig.denses[0].trained.items()}

    def reset() -> None:
        rig.denses[0].restore(first.__getitem__)
        rig.optimizers[0].reset()

    run = Run(
        recipe,
        STEPS,
        data,
        OneRank(),
        rig.workers[0],
        rig.clients[0],
        keeper,
        rig.table,
        coordinator,
        reset,
        kept,
        lambda: False,
        told.append,
    )
    return Setup(recipe, rig, run, kept, told)


@pytest.fixture
def undisturbed(checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path) -> Setup:
    setup = begin(checkpoint("mini"), tmp_path / "undisturbed", data_file)
    assert setup.run.train() == STEPS
    return setup


def test_snapshots_are_there_and_each_resumes_to_the_same_bits(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup
) -> None:
    data = load_data(undisturbed.recipe)
    cursors = [0]
    for _ in range(STEPS):
        cursors.append(data.after(cursors[-1], undisturbed.recipe.batch_tokens))
    assert undisturbed.kept.epochs == [cursor / len(data) for cursor in cursors[1:]]  # no sample twice, none left out
    found = snapshots(tmp_path / "undisturbed" / "snapshots")
    assert [path.name for path in found] == ["step-00000006", "step-00000004", "step-00000002"]
    for path in found[1:]:
        out = tmp_path / f"from-{path.name}"
        (out / "snapshots").mkdir(parents=True)
        shutil.copytree(path, out / "snapshots" / path.name)
        resumed = begin(checkpoint("mini"), out, data_file)
        assert resumed.run.train() == STEPS
        begun = int(path.name[-1])
        assert resumed.kept.resumes == [begun]
        assert resumed.kept.losses == {step: undisturbed.kept.losses[step] for step in range(begun + 1, STEPS + 1)}
        assert same(weights(resumed.rig), weights(undisturbed.rig))


@pytest.mark.parametrize("hosts", [1, 3])
def test_another_number_of_hosts_resumes_to_the_same_bits(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup, hosts: int
) -> None:
    out = tmp_path / "resumed"
    (out / "snapshots").mkdir(parents=True)
    shutil.copytree(tmp_path / "undisturbed" / "snapshots" / "step-00000002", out / "snapshots" / "step-00000002")
    resumed = begin(checkpoint("mini"), out, data_file, hosts=hosts)
    resumed.run.train()
    assert resumed.kept.losses == {step: undisturbed.kept.losses[step] for step in range(3, STEPS + 1)}


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_host_lost_without_a_replica_costs_steps_and_no_bit(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup, at: int
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file)
    rig = setup.rig
    rig.table.on_wait = lambda: come_back(rig, "host-1", 2) if "host-1" not in rig.hosts else None

    def kill(steps: int) -> None:
        if steps == at:
            setup.kept.after = None
            strike(rig, "backward", "host-1")

    if at == 0:
        strike(rig, "backward", "host-1")
    else:
        setup.kept.after = kill
    assert setup.run.train() == STEPS
    assert setup.kept.resumes == [0, {0: 0, 3: 2, 5: 4}[at]]
    assert setup.kept.losses == undisturbed.kept.losses
    assert same(weights(rig), weights(undisturbed.rig))
    assert any("going back to the last snapshot" in line for line in setup.told)


def test_a_host_with_a_replica_costs_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file, hosts=3, replicas=2)
    setup.rig.table.on_wait = lambda: come_back(setup.rig, "host-1", 2)
    setup.kept.after = lambda steps: strike(setup.rig, "backward", "host-1") if steps == 3 else None
    setup.run.train()
    assert setup.kept.resumes == [0]
    assert setup.kept.losses == undisturbed.kept.losses
    assert setup.told == []


def test_a_run_that_only_falls_back_ends_and_keeps_what_it_has(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file)
    rig = setup.rig

    def again() -> None:
        if "host-1" not in rig.hosts:
            come_back(rig, "host-1", rig.table.placement.hosts[1].generation + 1)

    rig.table.on_wait = again

    def kill(steps: int) -> None:
        if steps == 3:
            strike(rig, "backward", "host-1")
            rig.table.on_wait = lambda: (again(), strike(rig, "backward", "host-1"))[0]

    setup.kept.after = kill
    with pytest.raises(TooManySetbacks, match="step 3 was not made in 9 tries"):
        setup.run.train()
    assert [path.name for path in snapshots(tmp_path / "run" / "snapshots")] == ["step-00000002"]


def test_a_run_that_always_loses_the_same_step_ends_though_it_makes_others_in_between(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file)
    rig, tries = setup.rig, 0

    def again() -> None:
        if "host-1" not in rig.hosts:
            come_back(rig, "host-1", rig.table.placement.hosts[1].generation + 1)

    def kill(steps: int) -> None:
        nonlocal tries
        if steps == 3:
            tries += 1
            assert tries < 20, "it goes on for ever"
            strike(rig, "backward", "host-1")

    rig.table.on_wait = again
    setup.kept.after = kill
    with pytest.raises(TooManySetbacks, match="step 3 was not made in 9 tries, the last of which lost step 3"):
        setup.run.train()
    assert setup.kept.resumes == [0] + [2] * 8


@pytest.mark.parametrize("at", [2, 4])
def test_a_snapshot_that_is_written_when_the_next_step_is_lost_is_gone_back_to(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    data_file: Path,
    undisturbed: Setup,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file)
    rig, start = setup.rig, Keeper.start
    rig.table.on_wait = lambda: come_back(rig, "host-1", 2) if "host-1" not in rig.hosts else None

    def start_and_kill(keeper: Keeper, hosts: StepHosts, step: int, *given: Any) -> None:
        start(keeper, hosts, step, *given)
        if step == at:
            assert keeper._pending is not None
            assert keeper._pending.experts is not None
            keeper._pending.experts.result()  # their files lie there
            strike(rig, "backward", "host-1")

    monkeypatch.setattr(Keeper, "start", start_and_kill)
    assert setup.run.train() == STEPS
    assert setup.kept.resumes == [0, at]
    assert setup.kept.losses == undisturbed.kept.losses
    assert same(weights(rig), weights(undisturbed.rig))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_it_has(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file)

    def spoil(steps: int) -> None:
        if steps == 3:
            with torch.no_grad():
                setup.rig.denses[0]["model.norm.weight"][0] = float("inf")

    setup.kept.after = spoil
    with pytest.raises(NotFinite, match="nothing was stepped"):
        setup.run.train()
    resumed = begin(checkpoint("mini"), tmp_path / "run", data_file)
    assert resumed.run.train() == STEPS
    assert resumed.kept.resumes == [2]


def test_a_snapshot_that_is_written_when_a_loss_is_not_finite_is_kept(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file)
    step = setup.rig.workers[0].step

    def fail(plan: StepPlan) -> StepReport:
        if plan.step == 4:
            raise NotFinite("the loss of step 4 is nan")
        return step(plan)

    monkeypatch.setattr(setup.rig.workers[0], "step", fail)
    with pytest.raises(NotFinite):
        setup.run.train()
    assert [path.name for path in snapshots(tmp_path / "run" / "snapshots")] == ["step-00000004", "step-00000002"]


@pytest.mark.parametrize("method", ["lora", "esft"])
def test_other_methods_resume_to_the_same_bits_too(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, method: str
) -> None:
    whole = begin(checkpoint("mini"), tmp_path / "whole", data_file, method=method)
    whole.run.train()
    out = tmp_path / "resumed"
    (out / "snapshots").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "snapshots" / "step-00000004", out / "snapshots" / "step-00000004")
    resumed = begin(checkpoint("mini"), out, data_file, hosts=3, method=method)
    resumed.run.train()
    assert resumed.kept.losses == {step: whole.kept.losses[step] for step in (5, 6)}
    assert same(weights(resumed.rig), weights(whole.rig))


@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ({"method": "lora"}, None),
        ({"method": "lora", "lora": {"targets": ["attention"]}}, set()),
        ({"method": "esft"}, set(CHOSEN)),
    ],
    ids=["lora", "lora-attention", "esft"],
)
def test_a_snapshot_has_what_is_learned_and_the_checkpoint_the_rest(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    data_file: Path,
    given: dict[str, object],
    trained: set[tuple[int, int]] | None,
) -> None:
    whole = begin(checkpoint("mini"), tmp_path, data_file, **given)
    whole.run.train()
    newest = Snapshot.open(snapshots(tmp_path / "snapshots")[0])
    parts = [name.split(".") for shard in newest.manifest.shards for name in shard.tensors]
    kept = [((int(part[2]), int(part[5])), part[6:]) for part in parts if part[4:5] == ["experts"]]
    if trained is not None:
        assert {pair for pair, _ in kept} == trained
    else:
        assert kept
        assert all(name[1] in ("lora_A", "lora_B") for _, name in kept)
    resumed = begin(checkpoint("mini"), tmp_path, data_file, hosts=3, **given)
    for host in resumed.rig.hosts.values():  # as another run left them
        for pair in host.host.held:
            host.expert(pair).gate_up.zero_()
            host.expert(pair).down.zero_()
    resumed.run.train()
    assert resumed.kept.resumes == [STEPS]
    assert same(weights(resumed.rig), weights(whole.rig))


@pytest.mark.parametrize("method", ["lora", "esft"])
def test_a_snapshot_that_has_more_than_what_is_learned_resumes_to_the_same_bits(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole = begin(checkpoint("mini"), tmp_path, data_file, method=method)
    with monkeypatch.context() as earlier:  # as the first snapshots were written
        earlier.setattr(TrainingHost, "learned", TrainingHost.state)
        whole.run.train()
    for path in snapshots(tmp_path / "snapshots")[:2]:
        shutil.rmtree(path)
    resumed = begin(checkpoint("mini"), tmp_path, data_file, hosts=3, method=method)
    resumed.run.train()
    assert resumed.kept.resumes == [2]
    assert resumed.kept.losses == {step: whole.kept.losses[step] for step in range(3, STEPS + 1)}
    assert same(weights(resumed.rig), weights(whole.rig))


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ({}, {"method": "lora"}, "method was 'full' and is 'lora'"),
        ({}, {"method": "esft"}, "method was 'full' and is 'esft'"),
        ({"method": "lora"}, {"method": "lora", "lora": {"alpha": 64}}, "lora.alpha was 32.0 and is 64.0"),
        ({}, {"optimizer": {"beta2": 0.99}}, "optimizer.beta2 was 0.95 and is 0.99"),
    ],
    ids=["lora", "esft", "alpha", "betas"],
)
def test_a_snapshot_of_another_way_of_training_is_refused(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    data_file: Path,
    before: dict[str, object],
    now: dict[str, object],
    why: str,
) -> None:
    begin(checkpoint("mini"), tmp_path, data_file, **before).run.train()
    with pytest.raises(SnapshotError, match=f"is of another way of training: {why}"):
        begin(checkpoint("mini"), tmp_path, data_file, **now).run.train()
    assert len(snapshots(tmp_path / "snapshots")) == 3


def test_another_rate_and_other_snapshots_may_go_on(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path
) -> None:
    begin(checkpoint("mini"), tmp_path, data_file).run.train()
    longer = begin(checkpoint("mini"), tmp_path, data_file, lr=1e-4, snapshots={"every_steps": 3})
    assert longer.run.train() == STEPS


def test_other_data_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup
) -> None:
    data_file.write_text("".join(data_file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SnapshotError, match="was trained on other data"):
        begin(checkpoint("mini"), tmp_path / "undisturbed", data_file).run.train()


def test_a_full_disk_costs_a_snapshot_and_nothing_else(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    data_file: Path,
    undisturbed: Setup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = keeper_module.write_shard

    def full(staging: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Shard:
        if "step-00000004" in staging.name:
            raise DiskFull(f"{staging / name}: no room")
        return write(staging, name, tensors)

    monkeypatch.setattr(keeper_module, "write_shard", full)
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file)
    assert setup.run.train() == STEPS
    assert [path.name for path in snapshots(tmp_path / "run" / "snapshots")] == ["step-00000006", "step-00000002"]
    assert any("no snapshot of step 4" in line and "no room" in line for line in setup.told)
    assert setup.kept.losses == undisturbed.kept.losses


def test_records_that_cannot_be_kept_cost_a_snapshot_and_nothing_else(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup
) -> None:
    setup = begin(checkpoint("mini"), tmp_path / "run", data_file)
    setup.kept.full_at = 4
    assert setup.run.train() == STEPS
    assert [path.name for path in snapshots(tmp_path / "run" / "snapshots")] == ["step-00000006", "step-00000002"]
    assert setup.told == ["no snapshot of step 4: no room for records"]
    assert setup.kept.losses == undisturbed.kept.losses


def test_a_snapshot_of_another_model_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup
) -> None:
    other = begin(checkpoint("mini"), tmp_path / "undisturbed", data_file, fingerprint="another")
    with pytest.raises(SnapshotError, match="is of a model with fingerprint f, this one has another"):
        other.run.train()
    assert len(snapshots(tmp_path / "undisturbed" / "snapshots")) == 3


def test_a_snapshot_of_an_earlier_version_is_resumed_and_the_next_ones_are_of_this(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup
) -> None:
    root = tmp_path / "undisturbed" / "snapshots"
    for path in snapshots(root)[:2]:
        shutil.rmtree(path)
    other = begin(checkpoint("mini"), root.parent, data_file, fingerprint="f-2-now", first_fingerprint="g")
    with pytest.raises(SnapshotError, match="is of a model with fingerprint f, this one has g:"):
        other.run.train()
    again = begin(checkpoint("mini"), root.parent, data_file, fingerprint="f-2-now", first_fingerprint="f")
    assert again.run.train() == STEPS
    assert again.kept.resumes == [2]
    assert [Snapshot.open(path).manifest.fingerprint for path in snapshots(root)] == ["f-2-now", "f-2-now", "f"]
    assert same(weights(again.rig), weights(undisturbed.rig))


def test_a_flipped_byte_of_a_snapshot_is_found_and_the_one_before_it_used(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup
) -> None:
    newest = tmp_path / "undisturbed" / "snapshots" / "step-00000006"
    shard = next(newest.glob("experts-002-*"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    again = begin(checkpoint("mini"), tmp_path / "undisturbed", data_file)
    assert again.run.train() == STEPS
    assert again.kept.resumes == [4]
    assert any("a damaged snapshot was moved" in line and shard.name in line for line in again.told)
    assert same(weights(again.rig), weights(undisturbed.rig))


def test_a_damaged_snapshot_is_passed_over_or_named(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path, undisturbed: Setup
) -> None:
    newest = tmp_path / "undisturbed" / "snapshots" / "step-00000006"
    (newest / "manifest.json").write_bytes((newest / "manifest.json").read_bytes()[:-20])
    again = begin(checkpoint("mini"), tmp_path / "undisturbed", data_file)
    assert again.run.train() == STEPS
    assert again.kept.resumes == [4]
    assert any("broken snapshot" in line for line in again.told)
    assert again.kept.losses == {5: undisturbed.kept.losses[5], 6: undisturbed.kept.losses[6]}


def test_a_run_by_epochs_goes_on_from_where_its_batches_lead_and_no_other(
    checkpoint: Callable[[str], Path], tmp_path: Path, data_file: Path
) -> None:
    by_epochs: dict[str, object] = {"steps": None, "epochs": 50}
    begin(checkpoint("mini"), tmp_path, data_file, **by_epochs).run.train()
    assert begin(checkpoint("mini"), tmp_path, data_file, **by_epochs).run.train() == STEPS
    other = begin(checkpoint("mini"), tmp_path, data_file, **by_epochs, batch_tokens=256)
    with pytest.raises(SnapshotError, match="with epochs, the batches and a fraction of an epoch stay as they were"):
        other.run.train()
    shorter = begin(checkpoint("mini"), tmp_path, data_file)
    shorter.run._steps = STEPS - 1
    with pytest.raises(SnapshotError, match=f"is of step {STEPS} and the recipe has {STEPS - 1} steps"):
        shorter.run.train()
