"""Steps are a plain training loop's; the same seed gives the same bits; hosts that die, join or lag change none."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV2ForCausalLM

from attention.training.parameters import DenseParameters
from attention.training.segments import MicroBatch
from attention.training.worker import NotFinite
from experts.errors import HostUnavailable
from experts.training import coordinator as coordinator_module
from experts.training import states
from experts.training.adamw import AdamW
from experts.training.coordinator import Behind
from experts.training.expert import TrainedExpert
from experts.training.host import TrainingHost
from experts.training.spec import ExpertTraining
from experts.training.step_hosts import StepLost
from kernels.combine import SHARED_ROWS
from model.snapshots.attempt import begin
from model.snapshots.manifest import Shard
from router.placement import Host, initial_placement
from tests.training.local import LocalPeer
from tests.training.rig import Rig, make_host, make_rig, plans, samples

RATE = 2e-4


def batches_of(step: int) -> list[MicroBatch]:
    """Three batches in turn, so that there is something to learn."""
    seed = 100 + 2 * (step % 3)
    return [samples(512, (19, 11), seed), samples(512, (14, 16), seed + 1)]


def plain_losses(path: Path, steps: int, clip: float) -> list[float]:
    """A single process with torch's optimizer; norms do not decay."""
    model = DeepseekV2ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(steps):
        batches = batches_of(step)
        targets = sum(batch.targets for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            parts = zip(batch.token_T.split(batch.lengths), batch.target_T.split(batch.lengths), strict=True)
            for token_t, target_t in parts:
                logits = model(token_t[None]).logits[0]
                total = total + torch.nn.functional.cross_entropy(logits, target_t, reduction="sum")
        optimizer.zero_grad()
        (total / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(total.item() / targets)
    return losses


def train(rig: Rig, steps: range | int, before: Callable[[int], None] = lambda step: None) -> list[float]:
    losses: list[float] = []
    for step in range(steps) if isinstance(steps, int) else steps:
        before(step)
        spread: Sequence[Sequence[MicroBatch]] = (
            [batches_of(step)] if len(rig.workers) == 1 else [[batch] for batch in batches_of(step)]
        )
        losses.append(rig.step(plans(step, spread, RATE))[0].loss)
    return losses


def weights(rig: Rig) -> dict[str, Tensor]:
    """Every tensor as it stands; replicas must have the same."""
    found = {name: tensor.detach() for name, tensor in rig.denses[0].values()}
    for host in rig.hosts.values():
        for layer, expert in host.host.held:
            for name, tensor in host.expert((layer, expert)).state().items():
                key = f"{layer}.{expert}.{name}"
                assert key not in found or torch.equal(found[key], tensor)
                found[key] = tensor
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("hosts", "workers"), [(2, 1), (3, 2)])
def test_thirty_steps_have_a_plain_loops_losses(checkpoint: Callable[[str], Path], hosts: int, workers: int) -> None:
    path = checkpoint("mini")
    losses = train(make_rig(path, hosts, workers=workers, clip=1.0), 30)
    assert losses == pytest.approx(plain_losses(path, 30, clip=1.0), rel=1e-5)
    assert losses[-1] < losses[0]


def test_the_same_run_twice_and_on_other_hosts_has_the_same_bits(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("mini")
    runs = [make_rig(path, hosts, replicas, clip=1.0) for hosts, replicas in ((2, 1), (2, 1), (3, 1), (2, 2))]
    losses = [train(rig, 4) for rig in runs]
    assert losses[1:] == [losses[0]] * 3
    assert all(rig.lost == [] for rig in runs)
    assert all(same(weights(rig), weights(runs[0])) for rig in runs[1:])


def test_a_host_that_no_row_goes_to_takes_part_all_the_same(checkpoint: Callable[[str], Path]) -> None:
    rig = make_rig(checkpoint("mini"), 8)
    rig.step(plans(0, [[samples(512, (2,), 1)]], RATE))
    assert rig.lost == []
    assert {version for host in rig.hosts.values() for version in host.status().versions.values()} == {1}


def test_an_experts_many_rows_stay_together_so_that_backward_finds_what_forward_made(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(checkpoint("mini"), 2, 2)
    made: list[int] = []  # rows of each forward
    found: list[bool] = []  # of each backward, of whoever made them and of the replica
    forward, take = TrainedExpert.forward, TrainedExpert._take

    def counted(expert: TrainedExpert, x_ND: Tensor) -> Tensor:
        made.append(len(x_ND))
        return forward(expert, x_ND)

    def looked(expert: TrainedExpert, x_ND: Tensor) -> Tensor | None:
        kept = take(expert, x_ND)
        found.append(kept is not None)
        return kept

    monkeypatch.setattr(TrainedExpert, "forward", counted)
    monkeypatch.setattr(TrainedExpert, "_take", looked)
    rig.step(plans(0, [[samples(512, (60, 60, 60, 60, 60), 1)]], RATE))
    assert max(made) >= 2 * SHARED_ROWS
    assert (found.count(True), found.count(False)) == (len(made), len(made))


def lose(rig: Rig, host_id: str) -> None:
    del rig.hosts[host_id], rig.expert_hosts[host_id]


@pytest.mark.parametrize("moment", ["forward", "backward", "norms", "apply"])
def test_a_host_lost_within_a_step_whose_experts_have_replicas_changes_no_bit(
    checkpoint: Callable[[str], Path], moment: str
) -> None:
    path = checkpoint("mini")
    undisturbed = make_rig(path, 3, 2, clip=1.0)
    expected = train(undisturbed, 4)
    rig = make_rig(path, 3, 2, clip=1.0)

    def disturb(step: int) -> None:
        if step == 1:
            strike(rig, moment, "host-1")
        if step == 2:  # a later life has joined, with the checkpoint's weights
            assert "host-1" not in rig.hosts
            come_back(rig, "host-1", 2)

    assert train(rig, 4, disturb) == expected
    assert same(weights(rig), weights(undisturbed))
    assert (undisturbed.lost, rig.lost) == ([], ["host-1"])
    assert len(rig.hosts) == 3


def strike(rig: Rig, moment: str, host_id: str) -> None:
    """Lose a host when the second call of this kind is made on it in the next step."""
    target = rig.expert_hosts[host_id] if moment == "forward" else rig.hosts[host_id]
    name = {"forward": "forward", "backward": "backward", "norms": "squared_norms", "apply": "apply"}[moment]
    method = getattr(target, name)
    left = [1 if moment in ("forward", "backward") else 0]

    def call(*given: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            if host_id in rig.hosts:
                lose(rig, host_id)
            raise HostUnavailable(f"{host_id} was killed")
        return method(*given)

    setattr(target, name, call)


def come_back(rig: Rig, host_id: str, generation: int) -> None:
    placement = rig.table.placement
    life = Host(host_id, generation, "local")
    rig.expert_hosts[host_id], rig.hosts[host_id] = make_host(rig.checkpoint, life, placement.held_by(host_id))
    rig.table.placement = placement.with_hosts([life if host.id == host_id else host for host in placement.hosts])


def test_without_a_replica_the_step_is_lost_and_no_weight_changed(checkpoint: Callable[[str], Path]) -> None:
    rig = make_rig(checkpoint("mini"), 2, workers=2, clip=1.0)
    train(rig, 1)
    before = {name: tensor.clone() for name, tensor in weights(rig).items()}
    strike(rig, "backward", "host-1")
    with pytest.raises(StepLost, match="expert"):
        train(rig, range(1, 2))
    come_back(rig, "host-1", 2)
    now = weights(rig)
    names = [name for name in before if not name[0].isdigit() or name.split(".")[1] in map(str, range(4))]
    assert all(torch.equal(before[name], now[name]) for name in names)
    with pytest.raises(StepLost, match="no host has expert"):  # its later life is at the beginning
        train(rig, range(1, 2))


def test_hosts_that_join_and_leave_between_steps_change_no_bit(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("mini")
    expected = train(make_rig(path, 2, clip=1.0), 4)
    rig = make_rig(path, 2, clip=1.0)

    def rescale(step: int) -> None:
        count = {1: 3, 3: 1}.get(step)
        if count is None:
            return
        names = [Host(f"host-{number}", 1, "local") for number in range(count)]
        before = rig.table.placement
        table = initial_placement(rig.checkpoint.config, names, epoch=before.epoch + 1)
        for name in names:
            if name.id not in rig.hosts:
                rig.expert_hosts[name.id], rig.hosts[name.id] = make_host(rig.checkpoint, name, ())
            held = set(rig.expert_hosts[name.id].held)
            rig.expert_hosts[name.id].load(
                rig.checkpoint, [pair for pair in table.held_by(name.id) if pair not in held]
            )
        rig.table.placement = table

    assert train(rig, 4, rescale) == expected
    assert rig.table.in_use == rig.table.placement


def test_a_step_that_would_spoil_the_model_is_refused(checkpoint: Callable[[str], Path]) -> None:
    rig = make_rig(checkpoint("mini"), 2)
    train(rig, 1)
    before = {name: tensor.clone() for name, tensor in weights(rig).items()}
    with torch.no_grad():
        rig.denses[0]["model.norm.weight"][3] = float("nan")
    with pytest.raises(NotFinite, match="step 1: the loss is nan"):
        train(rig, range(1, 2))
    after = weights(rig)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "model.norm.weight")


def test_only_chosen_experts_are_trained(checkpoint: Callable[[str], Path]) -> None:
    only = ((1, 3), (2, 0))
    training = ExpertTraining("run", adamw=AdamW(), only=only)
    rig = make_rig(
        checkpoint("mini"),
        2,
        training=training,
        make_dense=lambda opened: DenseParameters.load(opened, lambda _: False),
    )
    before = {name: tensor.clone() for name, tensor in weights(rig).items()}
    train(rig, 2)
    after = weights(rig)
    changed = {tuple(map(int, name.split(".")[:2])) for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(only)


def test_a_resumed_step_is_told_by_who_is_behind(checkpoint: Callable[[str], Path]) -> None:
    rig = make_rig(checkpoint("mini"), 2)
    train(rig, 1)
    coordinator = rig.workers[0]._coordinator
    assert coordinator is not None
    with pytest.raises(Behind, match="at step 5"):
        coordinator.bring_level(rig.table.placement, 5)


def test_a_snapshot_is_of_one_step_while_the_next_one_computes(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(checkpoint("mini"), 2)
    train(rig, 1)
    before = {name: tensor.clone() for name, tensor in weights(rig).items()}
    coordinator = rig.workers[0]._coordinator
    assert coordinator is not None
    writing, computed, stepped = threading.Event(), threading.Event(), threading.Event()
    write, apply = states.write_shard, TrainingHost.apply

    def write_late(staging: Path, name: str, tensors: Mapping[str, Tensor]) -> Shard:
        writing.set()
        assert computed.wait(20)
        stepped.wait(0.2)  # which it must not be yet
        return write(staging, name, tensors)

    def note_apply(host: TrainingHost, *given: float) -> None:
        computed.set()
        apply(host, *given)  # type: ignore[arg-type]
        stepped.set()

    monkeypatch.setattr(states, "write_shard", write_late)
    monkeypatch.setattr(TrainingHost, "apply", note_apply)
    staging = begin(tmp_path, 1)
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(coordinator.save, rig.clients[0].hosts, staging, 1)
        assert writing.wait(20)
        train(rig, range(1, 2))
        shards = saved.result()
    written = {name: tensor for shard in shards for name, tensor in load_file(staging / shard.name).items()}
    names = {name: name.removeprefix("model.layers.").replace(".mlp.experts.", ".") for name in written}
    assert len(written) == sum(name[0].isdigit() for name in before)
    assert all(torch.equal(tensor, before[names[name]]) for name, tensor in written.items())
    assert not same(weights(rig), before)


def test_hosts_that_save_all_begin_at_once_and_keep_nobody_from_the_next_step(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "MAX_HOSTS_AT_ONCE", 1)
    rig = make_rig(checkpoint("mini"), 3)
    train(rig, 1)
    coordinator = rig.workers[0]._coordinator
    assert coordinator is not None
    everyone, go_on = threading.Barrier(4, timeout=20), threading.Event()

    def save(*_: object) -> list[Shard]:
        everyone.wait()
        assert go_on.wait(20)
        return []

    monkeypatch.setattr(LocalPeer, "save", save)
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(coordinator.save, rig.clients[0].hosts, tmp_path, 1)
        everyone.wait()
        train(rig, range(1, 2))
        go_on.set()
        assert saved.result() == []
