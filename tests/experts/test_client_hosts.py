"""What a client knows of its hosts: who is lost, who is late, who has left, and who may have come back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.client import ExpertClient
from experts.errors import ExpertsUnavailable
from experts.host import ExpertHost
from experts.static import StaticPlacement
from model.checkpoint import Checkpoint
from router.gate import Routing, route
from router.placement import Host, Placement
from tests.experts.test_client import LAYER, Recorded, compute
from tests.serving import make_hosts


@pytest.fixture
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("tiny"))


@pytest.fixture
def work(opened: Checkpoint) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 256, generator=generator), route(torch.randn(5, 16, generator=generator), opened.config)


class Forgetting(Recorded):
    """Keeps who was forgotten."""

    def __init__(self, hosts: dict[str, ExpertHost]) -> None:
        super().__init__(hosts)
        self.forgotten: list[str] = []

    def forget(self, host: Host) -> None:
        self.forgotten.append(host.id)


def test_a_life_that_comes_back_is_asked_again_by_the_same_table(
    opened: Checkpoint, work: tuple[torch.Tensor, Routing]
) -> None:
    hosts, placement = make_hosts(opened, 2)
    transport = Forgetting(hosts)
    expected = compute(ExpertClient(transport, StaticPlacement(placement)), placement, *work)
    transport.down = {"host-1"}

    class Waited(StaticPlacement):
        def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
            transport.down.clear()
            return placement

    client = ExpertClient(transport, Waited(placement), deadline_s=5.0)
    assert torch.equal(compute(client, placement, *work), expected)
    assert transport.forgotten == ["host-1"]  # a new stream is opened to it
    assert client.stats().resends == 1


def test_a_host_that_is_no_longer_named_is_forgotten_once(
    opened: Checkpoint, work: tuple[torch.Tensor, Routing]
) -> None:
    hosts, placement = make_hosts(opened, 2, replicas=2)
    transport = Forgetting(hosts)
    client = ExpertClient(transport, StaticPlacement(placement))
    compute(client, placement, *work)
    first, second = placement.hosts
    later = replace(placement, epoch=2, hosts=(first, Host("host-2", 1, second.address)))
    hosts["host-2"] = hosts["host-1"]
    client.slow(second, "late")
    assert second in client.avoided
    for _ in range(2):
        compute(client, later, *work)
    assert transport.forgotten == ["host-1"]
    assert second not in client.avoided
    compute(client, placement, *work)  # an older table changes nothing
    assert transport.forgotten == ["host-1"]


@pytest.mark.parametrize(("hedge_s", "timeout_s", "late_s"), [(0.4, 10.0, 0.4), (5.0, 1.0, 1.0)])
def test_nobody_is_waited_for_longer_than_a_lost_host(
    opened: Checkpoint, hedge_s: float, timeout_s: float, late_s: float
) -> None:
    hosts, placement = make_hosts(opened, 1)
    client = ExpertClient(
        Recorded(hosts), StaticPlacement(placement), hedge_s=hedge_s, reply_timeout_s=timeout_s, clock=lambda: 0.0
    )
    assert client.late_s == late_s
    client._slowest_s = 0.45
    assert client.late_s == max(late_s, min(0.9, timeout_s))


def test_without_a_holder_it_ends_at_the_deadline(opened: Checkpoint, work: tuple[torch.Tensor, Routing]) -> None:
    hosts, placement = make_hosts(opened, 2)
    transport = Recorded(hosts)
    transport.down = {"host-0", "host-1"}
    client = ExpertClient(transport, StaticPlacement(placement), deadline_s=0.0)
    with pytest.raises(ExpertsUnavailable, match=f"layer {LAYER}"):
        compute(client, placement, *work)
