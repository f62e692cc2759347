"""What the coordinator says of hosts that disagree, and of experts that nobody has any more."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.errors import HostRefused
from experts.training.coordinator import Behind, Coordinator
from experts.training.host import TrainingHost
from experts.training.step_hosts import StepHosts, StepLost, StepPlacement
from model.snapshots.attempt import begin
from router.holding import Pair
from router.placement import Host, Placement
from tests.training.rig import Rig, make_rig
from tests.training.test_steps import RATE, lose, train, weights


def coordinator_of(rig: Rig) -> Coordinator:
    found = rig.workers[0]._coordinator
    assert found is not None
    return found


def spoil(rig: Rig, host_id: str, change: Callable[[TrainingHost], None]) -> None:
    """Change something on a host once all gradients came, before its norms are asked for."""
    host = rig.hosts[host_id]
    norms = host.squared_norms

    def changed(step: int) -> dict[Pair, float]:
        host.settle()
        change(host)
        return norms(step)

    host.squared_norms = changed  # type: ignore[method-assign]


def test_replicas_whose_gradients_differ_are_found_and_nothing_is_stepped(checkpoint: Callable[[str], Path]) -> None:
    rig = make_rig(checkpoint("mini"), 2, 2, clip=1.0)
    before = {name: tensor.clone() for name, tensor in weights(rig).items()}

    def double(host: TrainingHost) -> None:
        grad = host.expert((1, 3)).parameters["down_proj"].grad
        assert grad is not None
        grad.mul_(2)

    spoil(rig, "host-1", double)
    with pytest.raises(StepLost, match=r"replicas of expert \(1, 3\) have gradients of"):
        train(rig, 1)
    assert all(torch.equal(weights(rig)[name], tensor) for name, tensor in before.items())


def begun(rig: Rig) -> StepHosts:
    """A step of one micro-batch on every host, of which nothing was computed."""
    coordinator, placement = coordinator_of(rig), rig.table.placement
    coordinator.bring_level(placement, 0)
    coordinator.begin(placement, 0, 1, 1)
    return rig.clients[0].begin(0, placement)


def test_gradients_that_are_no_numbers_on_every_replica_are_no_disagreement(checkpoint: Callable[[str], Path]) -> None:
    rig = make_rig(checkpoint("mini"), 2, 2)
    hosts = begun(rig)
    for host in rig.hosts.values():
        held = host.host.held
        host.squared_norms = lambda step, held=held: dict.fromkeys(held, math.nan)  # type: ignore[method-assign, misc]
    assert math.isnan(coordinator_of(rig).squared_norm(hosts))


def test_a_run_that_goes_on_with_hosts_at_its_beginning_is_told_to_go_back(
    checkpoint: Callable[[str], Path],
) -> None:
    rig = make_rig(checkpoint("mini"), 2)
    with pytest.raises(Behind, match=r"no host has expert \(1, 0\) at step 3, nor 15 others"):
        coordinator_of(rig).bring_level(rig.table.placement, 3)


def test_experts_that_no_host_stepped_are_lost(checkpoint: Callable[[str], Path]) -> None:
    rig = make_rig(checkpoint("mini"), 2)
    hosts, coordinator = begun(rig), coordinator_of(rig)
    rig.clients[0].skip(0)
    lost = hosts.placement.held_by("host-1")
    lose(rig, "host-1")
    for call in (lambda: coordinator.squared_norm(hosts), lambda: coordinator.apply(hosts, RATE, 1.0)):
        with pytest.raises(StepLost, match=rf"step 0: {len(lost)} experts, \({min(lost)[0]}, {min(lost)[1]}\) first"):
            call()
    assert [host.id for host in hosts.failed] == ["host-1"]


def test_an_expert_without_a_holder_that_made_the_step_is_not_saved(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    rig = make_rig(checkpoint("mini"), 2)
    train(rig, 1)
    hosts = rig.clients[0].hosts
    coordinator, staging = coordinator_of(rig), begin(tmp_path, 1)
    with pytest.raises(HostRefused, match="is at step 1; 2 is to be saved"):
        coordinator.save(hosts, begin(tmp_path, 2), 2)
    first = hosts.placement.holders(1, 0)[0]
    hosts.failed[first] = "it was killed"
    with pytest.raises(StepLost, match=r"no holder of expert .* is left to save it"):
        coordinator.save(hosts, staging, 1)
    assert list(staging.iterdir()) == []


def test_each_expert_is_saved_once_by_a_holder_that_made_the_step(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    rig = make_rig(checkpoint("mini"), 2, 2)
    train(rig, 1)
    hosts = rig.clients[0].hosts
    failed = hosts.placement.hosts[0]
    hosts.failed[failed] = "it was killed"
    shards = coordinator_of(rig).save(hosts, begin(tmp_path, 1), 1)
    names = [name for shard in shards for name in shard.tensors]
    assert len(names) == len(set(names)) == 6 * len(hosts.placement.held_by("host-1"))
    assert all("host-1" in shard.name for shard in shards)


def test_who_was_not_in_the_table_when_the_step_began_is_not_waited_for() -> None:
    gone: list[Host] = []
    source = StepPlacement(lambda host: host not in gone, lambda host, reason: None)
    with pytest.raises(RuntimeError, match="no step was begun"):
        source.snapshot()
    table = Placement(1, (Host("host-0", 1, ""), Host("host-1", 1, "")), {1: ((0,), (1,))})
    source.use(table)
    assert source.wait_newer(table.epoch, 0.0) is table
    gone.append(table.hosts[1])
    with pytest.raises(StepLost, match="host-1 went during the step"):
        source.wait_newer(table.epoch, 0.0)
