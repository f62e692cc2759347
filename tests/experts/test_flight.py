"""Dispatches by shared memory as a whole: the same bits as any other way, also when something goes wrong."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.arena import PAGE_BYTES, SLOTS
from experts.client import ExpertClient
from experts.dispatch_plan import OwnerTables
from experts.errors import HostRefused, HostUnavailable
from experts.flight import Flight, Lanes, take_off
from experts.grpc_server import ExpertServer
from experts.grpc_transport import GrpcTransport
from experts.host import ExpertHost
from experts.lane import lanes_serve
from experts.lease_call import LeaseCall
from experts.lease_door import LeaseDoor
from experts.lease_transport import LeaseTransport
from experts.local import LocalTransport
from experts.static import StaticPlacement
from experts.transport_kinds import Ways
from kernels.combine import NoOwner
from model.checkpoint import Checkpoint
from router.gate import Routing, route
from router.load import LoadMeter
from router.placement import Host, Placement, initial_placement

pytestmark = pytest.mark.skipif(not lanes_serve(), reason="no native kernels are built")
LAYER, TOKEN, SLOT_BYTES = 2, "the-token", 128 * PAGE_BYTES
SHARED = Ways(shared=True, nixl=False)


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("tiny"))


class Service:
    """Three hosts behind doors of their own, every expert on two of them."""

    def __init__(self, opened: Checkpoint) -> None:
        names = [Host(f"host-{index}", 1, "") for index in range(3)]
        held = initial_placement(opened.config, names, replicas=2)
        self.hosts: dict[str, ExpertHost] = {}
        self.servers: list[ExpertServer] = []
        self.doors: list[LeaseDoor] = []
        addressed: list[Host] = []
        for name in names:
            host = self.hosts[name.id] = ExpertHost(opened.config, name.id, 1)
            host.load(opened, held.held_by(name.id))
            self.doors.append(LeaseDoor(name.id, 1, SHARED))
            server = ExpertServer(host, token=TOKEN, door=self.doors[-1])
            server.start()
            self.servers.append(server)
            addressed.append(replace(name, address=server.address))
        self.placement = Placement(1, tuple(addressed), held.owners)
        self.transport = LeaseTransport(TOKEN, None, SLOT_BYTES, SLOT_BYTES, SHARED)
        assert all(self.transport.wait_ready(host, 10) for host in addressed)

    def lanes(self) -> Lanes:
        found = self.transport.lanes(self.placement.hosts)
        assert found is not None
        return found

    @property
    def free(self) -> list[int]:
        return [lease.slots.free for lease in self.transport._leases.values()]

    def settle(self) -> None:
        """Wait until every slot is free again."""
        deadline_s = time.monotonic() + 10
        while self.free != [SLOTS] * 3 and time.monotonic() < deadline_s:
            for lease in self.transport._leases.values():
                taken = lease.take()  # which looks for late replies
                if taken is not None:
                    lease.slots.release(taken[0])
        assert self.free == [SLOTS] * 3

    def close(self) -> None:
        self.transport.close()
        for server in self.servers:
            server.stop(0)


@pytest.fixture
def service(opened: Checkpoint) -> Iterator[Service]:
    made = Service(opened)
    yield made
    made.close()


@pytest.fixture
def landed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each flight that was waited for, whether it landed."""
    ends: list[bool] = []
    land = Flight.land

    def watch(*given: object) -> Tensor | None:
        out = land(*given)  # type: ignore[arg-type]
        ends.append(out is not None)
        return out

    monkeypatch.setattr(Flight, "land", watch)
    return ends


def work(opened: Checkpoint, tokens: int, seed: int = 0) -> tuple[Tensor, Routing, Tensor, Tensor]:
    """x, its routing, and what is added to the experts' sum."""
    random = torch.Generator().manual_seed(seed)
    x_TD, shared_TD, residual_TD = (torch.randn(tokens, 256, generator=random) for _ in range(3))
    return x_TD, route(torch.randn(tokens, 16, generator=random), opened.config), shared_TD, residual_TD


def in_process(service: Service, opened: Checkpoint, tokens: int, seed: int = 0) -> Tensor:
    """What a client of the same hosts in this process computes."""
    x_TD, routing, shared_TD, residual_TD = work(opened, tokens, seed)
    client = ExpertClient(LocalTransport(service.hosts), StaticPlacement(service.placement))
    return client.start(LAYER, x_TD, routing, service.placement).finish(shared_TD, residual_TD)


def dispatched(client: ExpertClient, service: Service, opened: Checkpoint, tokens: int, seed: int = 0) -> Tensor:
    x_TD, routing, shared_TD, residual_TD = work(opened, tokens, seed)
    return client.start(LAYER, x_TD, routing, service.placement).finish(shared_TD, residual_TD)


def make_client(service: Service, **given: object) -> ExpertClient:
    return ExpertClient(service.transport, StaticPlacement(service.placement), **given)  # type: ignore[arg-type]


def test_the_bits_and_the_counts_are_those_of_hosts_in_this_process(
    service: Service, opened: Checkpoint, landed: list[bool]
) -> None:
    layers, experts = opened.config.moe_layers, opened.config.n_routed_experts
    meters = [LoadMeter(layers, experts) for _ in range(2)]
    client = make_client(service, meter=meters[0])
    local = ExpertClient(LocalTransport(service.hosts), StaticPlacement(service.placement), meter=meters[1])
    for seed, tokens in enumerate((1, 2, 3, 7, 30, 63, 1, 5)):
        x_TD, routing, shared_TD, residual_TD = work(opened, tokens, seed)
        for added in ((shared_TD, residual_TD), (None, residual_TD), (shared_TD, None), (None, None)):
            got = client.start(LAYER, x_TD, routing, service.placement).finish(*added)
            assert torch.equal(got, local.start(LAYER, x_TD, routing, service.placement).finish(*added))
    assert landed == [True] * 32
    assert client.stats() == local.stats()
    assert meters[0].take() == meters[1].take()
    assert service.free == [SLOTS] * 3


def test_hosts_that_share_memory_are_beside_this_process(service: Service) -> None:
    assert make_client(service).beside(service.placement) == 3
    by_grpc = ExpertClient(GrpcTransport("token"), StaticPlacement(service.placement))
    assert by_grpc.beside(service.placement) == 0


def test_two_halves_are_under_way_at_once(service: Service, opened: Checkpoint, landed: list[bool]) -> None:
    client = make_client(service)
    flying = []
    for seed in (1, 2):
        x_TD, routing, shared_TD, residual_TD = work(opened, 9, seed)
        flying.append((client.start(LAYER, x_TD, routing, service.placement), shared_TD, residual_TD))
    for seed, (dispatch, shared_TD, residual_TD) in zip((1, 2), flying, strict=True):
        assert torch.equal(dispatch.finish(shared_TD, residual_TD), in_process(service, opened, 9, seed))
    assert landed == [True, True]


def test_what_fits_no_slot_goes_another_way(service: Service, opened: Checkpoint, landed: list[bool]) -> None:
    tokens = SLOT_BYTES // 1024 + 1
    got = dispatched(make_client(service), service, opened, tokens)
    assert torch.equal(got, in_process(service, opened, tokens))
    assert landed == []
    assert service.free == [SLOTS] * 3


def test_rows_go_another_way_while_all_slots_are_in_use(
    service: Service, opened: Checkpoint, landed: list[bool]
) -> None:
    client = make_client(service)
    x_TD, routing, *_ = work(opened, 9)
    kept = [client.start(LAYER, x_TD, routing, service.placement) for _ in range(SLOTS)]
    assert min(service.free) == 0
    assert torch.equal(dispatched(client, service, opened, 9, 5), in_process(service, opened, 9, 5))
    assert landed == []
    for dispatch in kept:
        dispatch.finish()
    assert landed == [True] * SLOTS


def test_a_dispatch_that_nobody_finishes_gives_its_slots_back(
    service: Service, opened: Checkpoint, landed: list[bool]
) -> None:
    client = make_client(service)
    x_TD, routing, *_ = work(opened, 9)
    for abandon in (True, False):
        for _ in range(2 * SLOTS):
            dispatch = client.start(LAYER, x_TD, routing, service.placement)
            if abandon:
                dispatch.abandon()
            del dispatch
        gc.collect()
        service.settle()
        landed.clear()
        assert torch.equal(dispatched(client, service, opened, 9, 1), in_process(service, opened, 9, 1))
        assert landed == [True]


def test_a_host_that_refuses_is_replaced_by_another(service: Service, opened: Checkpoint, landed: list[bool]) -> None:
    service.hosts["host-1"].closed = "on purpose"
    client = make_client(service)
    assert torch.equal(dispatched(client, service, opened, 9), in_process(service, opened, 9))
    assert landed == [False]
    assert client.stats().resends == 1


def test_an_expert_that_is_not_held_any_more_is_asked_for_elsewhere(
    service: Service, opened: Checkpoint, landed: list[bool]
) -> None:
    host = service.hosts["host-2"]
    expected = in_process(service, opened, 9)
    host.unload([pair for pair in host.held if pair[0] == LAYER][:3])
    assert torch.equal(dispatched(make_client(service), service, opened, 9), expected)
    assert landed == [False]


def test_a_request_that_lies_is_refused(service: Service, opened: Checkpoint) -> None:
    x_TD, routing, *_ = work(opened, 3)
    routing.experts_TK[1, 1] = 15
    placement, lanes = service.placement, service.lanes()
    owner_E = torch.tensor([owners[0] for owners in placement.owners[LAYER]], dtype=torch.int32)
    flight = take_off(lanes, owner_E, LAYER + 99, 1, x_TD, routing.experts_TK, None, 0.0)
    assert flight is not None
    assert flight.land(routing.weights_TK, None, None, 10) is None
    for *_, call in flight.calls():
        with pytest.raises(HostRefused, match="does not hold"):
            call.result(10)
    assert service.free == [SLOTS] * 3


def test_an_expert_without_an_owner_is_named_and_nobody_is_asked(service: Service, opened: Checkpoint) -> None:
    x_TD, routing, *_ = work(opened, 3)
    owner_E = torch.zeros(16, dtype=torch.int32)
    owner_E[int(routing.experts_TK[1, 2])] = -1
    counts_E = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(NoOwner) as caught:
        take_off(service.lanes(), owner_E, LAYER, 1, x_TD, routing.experts_TK, counts_E.data_ptr(), 0.0)
    assert caught.value.expert == int(routing.experts_TK[1, 2])
    assert not counts_E.any()
    assert service.free == [SLOTS] * 3


def test_without_an_owner_rows_wait_for_a_table_that_has_one(
    service: Service, opened: Checkpoint, landed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x_TD, routing, shared_TD, residual_TD = work(opened, 9)
    client = make_client(service)
    owners = OwnerTables.owners
    lacking = torch.full((16,), -1, dtype=torch.int32)
    asked: list[int] = []

    def first_none(this: OwnerTables, *given: object) -> Tensor:
        asked.append(1)
        return lacking if len(asked) == 1 else owners(this, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(OwnerTables, "owners", first_none)
    got = client.start(LAYER, x_TD, routing, service.placement).finish(shared_TD, residual_TD)
    monkeypatch.undo()
    assert torch.equal(got, in_process(service, opened, 9))
    assert service.free == [SLOTS] * 3


def test_a_host_that_is_late_is_hedged_and_its_reply_spoils_nothing(
    service: Service, opened: Checkpoint, landed: list[bool]
) -> None:
    expected = in_process(service, opened, 9)
    client = make_client(service, hedge_s=0.05)
    with service.hosts["host-0"].computing():
        assert torch.equal(dispatched(client, service, opened, 9), expected)
        assert torch.equal(dispatched(client, service, opened, 9), expected)  # others are asked for a while
    assert landed == [False]
    assert client.stats().hedges == 1
    client._avoided.clear()
    for seed in range(3 * SLOTS):
        assert torch.equal(dispatched(client, service, opened, 9, seed), in_process(service, opened, 9, seed))
    assert landed[1:] == [True] * (3 * SLOTS)
    assert service.free == [SLOTS] * 3


def test_a_host_that_goes_meanwhile_costs_a_resend(service: Service, opened: Checkpoint) -> None:
    expected = in_process(service, opened, 9)
    client = make_client(service)
    x_TD, routing, shared_TD, residual_TD = work(opened, 9)
    with service.hosts["host-0"].computing():
        dispatch = client.start(LAYER, x_TD, routing, service.placement)
        service.servers[0].stop(0)
        service.doors[0].end(service.doors[0]._leases[0]) if service.doors[0]._leases else None
        assert torch.equal(dispatch.finish(shared_TD, residual_TD), expected)
    assert client.stats().resends == 1


def test_a_new_life_is_reached_when_a_lane_is_over(service: Service, opened: Checkpoint, landed: list[bool]) -> None:
    client = make_client(service)
    service.transport.forget(service.placement.hosts[1])
    assert torch.equal(dispatched(client, service, opened, 9), in_process(service, opened, 9))
    assert landed == []  # while there is no lease
    assert service.transport.wait_ready(service.placement.hosts[1], 10)
    assert torch.equal(dispatched(client, service, opened, 9), in_process(service, opened, 9))
    assert landed == [True]


def test_a_newer_table_with_hosts_in_another_order_is_gone_by(
    service: Service, opened: Checkpoint, landed: list[bool]
) -> None:
    before = service.placement
    owners = {
        layer: tuple(tuple(2 - index for index in holders) for holders in experts)
        for layer, experts in before.owners.items()
    }
    turned = Placement(2, before.hosts[::-1], owners)
    assert turned.held_by("host-0") == before.held_by("host-0")
    client = make_client(service)
    x_TD, routing, shared_TD, residual_TD = work(opened, 9)
    for placement in (before, turned, turned):
        got = client.start(LAYER, x_TD, routing, placement).finish(shared_TD, residual_TD)
        assert torch.equal(got, in_process(service, opened, 9))
    assert landed == [True] * 3
    assert client.stats().resends == 0
    assert service.lanes() is service.lanes()  # of the same table they are made once


def test_an_unreadable_call_is_over(service: Service, opened: Checkpoint) -> None:
    x_TD, routing, *_ = work(opened, 3)
    placement = service.placement
    owner_E = torch.tensor([owners[0] for owners in placement.owners[LAYER]], dtype=torch.int32)
    flight = take_off(service.lanes(), owner_E, LAYER, 1, x_TD, routing.experts_TK, None, 0.0)
    assert flight is not None
    (_, _, _, call), *_ = flight.calls()
    assert isinstance(call, LeaseCall)
    call.release()
    with pytest.raises(HostUnavailable, match="this call is over"):
        call.result(1)
