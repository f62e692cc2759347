"""By which way rows go to a host: what is said of it, and what goes by gRPC instead."""

import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from experts.arena import PAGE_BYTES
from experts.grpc_server import ExpertServer
from experts.lane import Lane
from experts.lease_call import LeaseCall
from experts.lease_opening import LeaseOpening
from experts.messages import ForwardRequest
from experts.nixl import NixlMissing, find_nixl
from experts.nixl_pairing import NixlPairing
from experts.pairing import Pairing, PairingFailed
from router.placement import Host
from tests.experts.leases.rows import TOKEN, Counting, Make, ask, at, request


def test_the_way_that_is_said_is_the_one_that_rows_take(
    host: Counting, server: ExpertServer, make: Make, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a lease, by it, after it was lost, by the next one, and once the host is forgotten."""
    monkeypatch.setattr("experts.lease_transport.RETRY_S", 0.1)
    transport = make()
    assert transport.ways() == {}
    with monkeypatch.context() as held:
        let_go = threading.Event()
        run = LeaseOpening.run

        def wait(opening: LeaseOpening, messages: Iterator[bytes]) -> Pairing:
            let_go.wait(20)
            return run(opening, messages)

        held.setattr(LeaseOpening, "run", wait)
        assert not isinstance(transport.submit(at(server), request()), LeaseCall)
        assert transport.ways() == {at(server): "grpc"}
        let_go.set()
        assert transport.wait_ready(at(server), 10)
    ask(transport, at(server), request())
    assert transport.ways() == {at(server): way}

    def fail(*given: object) -> None:
        raise PairingFailed("the connection is gone")

    with monkeypatch.context() as broken:
        for kind in (Lane, NixlPairing):
            broken.setattr(kind, "write", fail)
        assert not isinstance(transport.submit(at(server), request()), LeaseCall)
    assert transport.ways() == {at(server): "grpc"}
    deadline_s = time.monotonic() + 20
    while transport.ways() != {at(server): way}:
        assert time.monotonic() < deadline_s, "it went on by gRPC"
        time.sleep(0.05)
        transport.submit(at(server), request()).result(10)
    transport.forget(at(server))
    assert transport.ways() == {}


def test_another_thread_may_ask_for_the_ways_while_hosts_come_and_go_and_waits_for_nobody(make: Make) -> None:
    """Nor for whoever holds a lock: a heartbeat that is late is a worker that is lost."""
    transport, lease = make(), SimpleNamespace(way="nixl", close=lambda: None, thread=threading.current_thread())
    seen: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append(len(transport.ways()))

    thread = threading.Thread(target=look, daemon=True)
    hosts = [Host(f"host-{index}", 1, "127.0.0.1:1") for index in range(200)]
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        rounds, deadline_s = 0, time.monotonic() + 10
        while rounds < 30 or not (any(seen) or time.monotonic() > deadline_s):
            rounds += 1
            for coming in hosts:
                transport._leases[coming] = transport._grpc._streams[coming] = lease  # type: ignore[assignment]
            for leaving in hosts:
                transport.forget(leaving)
        with transport._lock, transport._grpc._lock:
            looks, deadline_s = len(seen), time.monotonic() + 10
            while len(seen) < looks + 3:
                assert thread.is_alive()
                assert time.monotonic() < deadline_s, "it waits for the lock"
                time.sleep(0.001)
    finally:
        sys.setswitchinterval(switch_s)
        over.set()
        thread.join(10)
        transport._leaving.clear()
    assert max(seen) > 0


@pytest.mark.skipif(find_nixl() is None, reason="NIXL is not installed")
def test_no_call_waits_for_the_making_of_an_agent(
    host: Counting, server: ExpertServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes as long as many layers: neither one to that host or another, nor one whose host is lost meanwhile."""
    making, let_go, over = threading.Event(), threading.Event(), threading.Event()

    def slowly(*given: object) -> None:
        making.set()
        let_go.wait(20)
        raise NixlMissing("not today")

    monkeypatch.setattr("experts.lease_transport.NixlAgent", slowly)
    transport = make(machine="another machine")
    other = Host("host-1", 1, server.address)

    def work() -> None:
        for asked in (at(server), other):
            transport.submit(asked, request()).result(10)
        transport.forget(other)
        over.set()

    transport.submit(at(server), request()).result(10)
    assert making.wait(10)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert over.wait(5), "it waits for the agent"
    finally:
        let_go.set()
        thread.join(10)


@pytest.mark.parametrize("rows", [64, 400])
def test_what_fits_no_slot_goes_by_grpc(host: Counting, server: ExpertServer, make: Make, rows: int) -> None:
    transport = make(slot=16 * PAGE_BYTES)
    assert transport.wait_ready(at(server), 10)
    ask(transport, at(server), request(60))
    call = transport.submit(at(server), request(rows))
    assert not isinstance(call, LeaseCall)
    assert torch.equal(call.result(10).y_PD, host.forward(request(rows)).y_PD)


@pytest.mark.skipif(find_nixl() is None, reason="NIXL is not installed")
def test_a_host_whose_memory_cannot_be_mapped_is_reached_by_nixl(
    host: Counting, server: ExpertServer, make: Make, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.lease_transport.RETRY_S", 0.05)
    monkeypatch.setattr("experts.lane.map_shared", lambda address, nbytes: None)
    transport = make()
    deadline_s = time.monotonic() + 20
    while not transport.wait_ready(at(server), 10):
        assert time.monotonic() < deadline_s, "it went on by gRPC"
        transport.submit(at(server), request()).result(10)
        time.sleep(0.02)
    assert isinstance(transport._leases[at(server)].pairing, NixlPairing)
    assert transport.ways() == {at(server): "nixl"}
    assert torch.equal(ask(transport, at(server), request()).y_PD, host.forward(request()).y_PD)


def test_a_reply_larger_than_its_slot_goes_by_grpc(host: Counting, server: ExpertServer, make: Make) -> None:
    transport = make(slot=16 * PAGE_BYTES)
    assert transport.wait_ready(at(server), 10)
    rows, experts = torch.arange(96).int() % 4, torch.arange(96).int() % 16
    many = ForwardRequest(1, 1, 1, torch.randn(4, 256), rows, experts)
    call = transport.submit(at(server), many)
    assert not isinstance(call, LeaseCall)
    assert torch.equal(call.result(10).y_PD, host.forward(many).y_PD)


def test_a_host_without_leases_is_asked_by_grpc(host: Counting, make: Make) -> None:
    server = ExpertServer(host, token=TOKEN)
    server.start()
    transport = make()
    assert not transport.wait_ready(at(server), 10)
    call = transport.submit(at(server), request())
    assert not isinstance(call, LeaseCall)
    assert torch.equal(call.result(10).y_PD, host.forward(request()).y_PD)
    assert transport.ways() == {at(server): "grpc"}
    server.stop(0)
