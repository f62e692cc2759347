"""Hosts of this very process, whatever a table says of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from experts.client import ExpertClient
from experts.host import ExpertHost
from experts.local import LocalTransport
from experts.near import NearHosts
from experts.static import StaticPlacement
from model.checkpoint import Checkpoint
from router.gate import Routing
from router.placement import Host, Placement
from tests.serving import greedy, make_engine, make_hosts, run

pytestmark = pytest.mark.usefixtures("interpreted")
LIMITS = EngineLimits(cache_blocks=16, max_length=64)
REQUEST = greedy("a", (7,), 2, logprobs=1)


@pytest.fixture
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("least"))


def test_a_host_that_holds_nothing_of_a_layer_is_not_asked(opened: Checkpoint) -> None:
    hosts, placement = make_hosts(opened, 1)
    hosts["idle"] = ExpertHost(opened.config, "idle", 1)
    source = StaticPlacement(replace(placement, hosts=(*placement.hosts, Host("idle", 1, "local"))))
    client = ExpertClient(LocalTransport(hosts), source)
    answer = run(Engine(Decoder(opened, client, source), LIMITS), [REQUEST])["a"]
    wanted = run(make_engine(opened.directory, 1, LIMITS), [REQUEST])["a"]
    assert (answer.tokens, answer.logprobs) == (wanted.tokens, wanted.logprobs)


def test_a_new_table_is_read_where_the_one_before_it_was(opened: Checkpoint) -> None:
    hosts, placement = make_hosts(opened, 2, replicas=2)
    near, layer = near_hosts(placement, hosts), opened.config.moe_layers[0]
    experts = opened.config.n_routed_experts
    x_TD = torch.randn(3, opened.config.hidden_size, generator=torch.Generator().manual_seed(1))
    routing = Routing(torch.arange(6).view(3, 2) % experts, torch.ones(3, 2))
    lies, answers = set(), []
    for owner in (0, 1, 0, 1):  # a table each, of hosts that stay as they are
        flight = near.take_off(torch.full((experts,), owner, dtype=torch.int32), layer, x_TD, routing, 0.0)
        assert flight is not None
        answers.append(flight.land(routing.weights_TK, None, None, 0.0))
        lies |= {split.near_E.data_ptr() for split in near._splits.values()}
    assert len(near._splits) == len(lies) == 1
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_hosts_are_taken_in_one_order_whatever_a_table_has(opened: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts, placement = make_hosts(opened, 3)
    entered: list[str] = []

    @contextmanager
    def computing(host: ExpertHost) -> Iterator[None]:
        entered.append(host.host_id)
        yield

    monkeypatch.setattr(ExpertHost, "computing", computing)
    for table in (placement, replace(placement, hosts=tuple(reversed(placement.hosts)))):
        with near_hosts(table, hosts).computing():
            pass
    assert entered[:3] == entered[3:]


def near_hosts(placement: Placement, hosts: dict[str, ExpertHost]) -> NearHosts:
    return NearHosts(placement.hosts, [hosts[host.id] for host in placement.hosts])
