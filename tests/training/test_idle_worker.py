"""A worker without rows: the hosts do not wait for it, and its part of the sums is nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention.training.parameters import DenseParameters
from experts.errors import HostUnavailable
from experts.training.step_hosts import StepLost
from tests.training.rig import Rig, make_rig, plans
from tests.training.test_steps import RATE, batches_of, lose, same, weights


def uneven(rig: Rig, step: int) -> list[float]:
    """One step whose second micro-batch is the first worker's alone; what each worker says of it."""
    first, second = batches_of(step)
    rest = [[None, None] for _ in rig.workers[1:]]
    reports = rig.step(plans(step, [[first, second], *rest], RATE))
    assert len({report.grad_norm for report in reports}) == 1
    return [report.loss for report in reports]


@pytest.mark.parametrize(("hosts", "replicas"), [(2, 1), (3, 2)])
def test_a_worker_without_rows_changes_no_bit(checkpoint: Callable[[str], Path], hosts: int, replicas: int) -> None:
    alone = make_rig(checkpoint("mini"), hosts, replicas, clip=1.0)
    beside = make_rig(checkpoint("mini"), hosts, replicas, workers=3, clip=1.0)
    for step in range(2):
        (loss,) = uneven(alone, step)
        assert uneven(beside, step) == [loss] * 3
    assert same(weights(beside), weights(alone))
    assert all(
        torch.equal(tensor, dict(beside.denses[0].values())[name])
        for dense in beside.denses[1:]
        for name, tensor in dense.values()
    )
    assert beside.lost == []


def test_a_parameter_that_no_row_reached_is_stepped_all_the_same(checkpoint: Callable[[str], Path]) -> None:
    """It has no gradient where there are no rows, and the others' where there are."""
    rig = make_rig(
        checkpoint("mini"),
        workers=2,
        make_dense=lambda opened: DenseParameters.load(opened, lambda name: name == "lm_head.weight"),
    )
    before = rig.denses[1]["lm_head.weight"].detach().clone()
    uneven(rig, 0)
    now = [dense["lm_head.weight"].detach() for dense in rig.denses]
    assert torch.equal(*now)
    assert not torch.equal(now[1], before)


@pytest.mark.parametrize(("hosts", "replicas"), [(2, 1), (3, 2)])
def test_a_host_that_is_lost_to_a_worker_without_rows_takes_no_part(
    checkpoint: Callable[[str], Path], hosts: int, replicas: int
) -> None:
    rig = make_rig(checkpoint("mini"), hosts, replicas, workers=2, clip=1.0)
    host = rig.hosts["host-1"]
    backward = host.backward

    def gone(*given: object) -> object:
        request = given[0]
        if request.rank == 0:  # type: ignore[attr-defined]
            return backward(*given)  # type: ignore[arg-type]
        if "host-1" in rig.hosts:
            lose(rig, "host-1")
        raise HostUnavailable("host-1 was killed")

    host.backward = gone  # type: ignore[method-assign, assignment]
    if replicas == 1:
        with pytest.raises(StepLost, match="host-1"):
            uneven(rig, 0)
        return
    expected = make_rig(checkpoint("mini"), hosts, replicas, clip=1.0)
    (loss,) = uneven(expected, 0)
    assert uneven(rig, 0) == [loss] * 2
    assert rig.lost == ["host-1"]
    assert all(torch.equal(tensor, weights(expected)[name]) for name, tensor in weights(rig).items())


@pytest.mark.parametrize(("clip", "scales"), [(1.0, [1.0, 1.0, 1.0, 0.5]), (None, [1.0] * 4)])
def test_gradients_are_only_ever_made_smaller(
    checkpoint: Callable[[str], Path], clip: float | None, scales: list[float]
) -> None:
    """Also where there are none."""
    (worker,) = make_rig(checkpoint("mini"), clip=clip).workers
    assert [worker._scale(norm) for norm in (0.0, 0.5, 1.0, 2.0)] == scales
