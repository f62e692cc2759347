"""Hosts by lease: the same bits, slots that come back, peers that die, freeze or lie, and nothing left behind."""

import gc
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experts.arena import PAGE_BYTES, SLOTS, Arena
from experts.arena_frames import put_request
from experts.client_lease import ClientLease
from experts.errors import FrameError, HostRefused, HostUnavailable
from experts.frames import HEADER
from experts.grpc_server import ExpertServer
from experts.host import ExpertHost
from experts.lane import Lane, lanes_serve
from experts.lease import NOTE
from experts.lease_call import LeaseCall
from experts.lease_door import LeaseDoor
from experts.lease_transport import LeaseTransport
from experts.messages import ForwardReply, ForwardRequest
from experts.nixl import NixlMissing, find_nixl, prepare_environment
from experts.nixl_pairing import NixlPairing
from experts.pairing import Pairing, PairingFailed
from experts.transport_kinds import Ways
from kernels.lane import Asked
from model.checkpoint import Checkpoint
from router.placement import Host
from tests.experts.host_process import HostProcess

prepare_environment()
TOKEN = "the-token-of-this-service"
SLOT_BYTES = 64 * PAGE_BYTES


class Counting(ExpertHost):
    """Counts grouped calls, and can be held up."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.batches: list[int] = []
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.let_go.set()

    def answer_in_place(self, lane: int, asked: Asked) -> bool:
        self.batches.append(1)
        self.entered.set()
        assert self.let_go.wait(20)
        if super().answer_in_place(lane, asked):
            return True
        self.batches.remove(1)
        return False

    def forward_batch(self, requests, outs=None):  # type: ignore[no-untyped-def]
        self.batches.append(len(requests))
        self.entered.set()
        assert self.let_go.wait(20)
        return super().forward_batch(requests, outs)


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("tiny"))


@pytest.fixture(scope="module")
def host(opened: Checkpoint) -> Counting:
    made = Counting(opened.config, "host-0", 1)
    made.load(opened, [(1, expert) for expert in range(16)])
    return made


@pytest.fixture(
    params=[
        pytest.param("shared", marks=pytest.mark.skipif(not lanes_serve(), reason="no native kernels are built")),
        pytest.param("nixl", marks=pytest.mark.skipif(find_nixl() is None, reason="pip install shoal[nixl]")),
    ]
)
def way(request: pytest.FixtureRequest) -> str:
    """To hosts of this machine; others are reached by NIXL."""
    return str(request.param)


@pytest.fixture
def ways(way: str) -> Ways:
    return Ways(shared=way == "shared", nixl=True)


@pytest.fixture
def door(ways: Ways) -> LeaseDoor:
    return LeaseDoor("host-0", 1, ways)


@pytest.fixture
def server(host: Counting, door: LeaseDoor) -> Iterator[ExpertServer]:
    made = ExpertServer(host, token=TOKEN, door=door)
    made.start()
    yield made
    host.let_go.set()
    made.stop(0)


Make = Callable[..., LeaseTransport]


@pytest.fixture
def make(ways: Ways) -> Iterator[Make]:
    made: list[LeaseTransport] = []

    def transport(token: str | None = TOKEN, machine: str | None = None, slot: int = SLOT_BYTES) -> LeaseTransport:
        made.append(LeaseTransport(token, None, slot, slot, ways, machine))
        return made[-1]

    yield transport
    for each in made:
        each.close()


@pytest.fixture
def processes(checkpoint: Callable[[str], Path], way: str) -> Iterator[Callable[..., HostProcess]]:
    started: list[HostProcess] = []

    def start(generation: int = 1) -> HostProcess:
        started.append(HostProcess(checkpoint("tiny"), TOKEN, way, generation))
        return started[-1]

    yield start
    for each in started:
        each.end()


def at(server: ExpertServer) -> Host:
    return Host("host-0", 1, server.address)


def request(rows: int = 4, seed: int = 0, generation: int = 1) -> ForwardRequest:
    x_RD = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))
    return ForwardRequest(1, generation, 1, x_RD, torch.arange(rows).int(), (torch.arange(rows) % 16).int())


def ask(transport: LeaseTransport, host: Host, wanted: ForwardRequest, timeout_s: float = 10) -> ForwardReply:
    """The reply, which must have come by the lease; the tensor is a copy."""
    call = transport.submit(host, wanted)
    assert isinstance(call, LeaseCall)
    reply = call.result(timeout_s)
    copied = ForwardReply(reply.generation, reply.y_PD.clone())
    call.release()
    return copied


def test_the_way_that_is_said_is_the_one_that_rows_take(
    host: Counting, server: ExpertServer, make: Make, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a lease, by it, after it was lost, by the next one, and once the host is forgotten."""
    monkeypatch.setattr("experts.lease_transport.RETRY_S", 0.1)
    transport = make()
    assert transport.ways() == {}
    with monkeypatch.context() as held:
        let_go = threading.Event()
        opened = ClientLease._open
        held.setattr(ClientLease, "_open", lambda lease: (let_go.wait(20), opened(lease)))
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
        for _ in range(30):
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


NEAR_AND_FAR = [
    None,
    pytest.param("another machine", marks=pytest.mark.skipif(find_nixl() is None, reason="NIXL is not installed")),
]


@pytest.mark.parametrize("machine", NEAR_AND_FAR, ids=["near", "far"])
def test_the_bits_are_those_of_a_call_in_process(
    host: Counting, server: ExpertServer, make: Make, way: str, machine: str | None
) -> None:
    transport = make(machine=machine)
    assert transport.wait_ready(at(server), 10)
    for rows in (1, 7, 60, 3, 200):
        assert torch.equal(ask(transport, at(server), request(rows)).y_PD, host.forward(request(rows)).y_PD)
    assert transport.ways() == {at(server): way if machine is None else "nixl"}


def test_a_host_in_another_process_gives_the_same_bits(
    host: Counting, processes: Callable[..., HostProcess], make: Make
) -> None:
    other = processes()
    transport = make()
    assert transport.wait_ready(other.host, 10)
    for rows in (1, 7, 60):
        assert torch.equal(ask(transport, other.host, request(rows)).y_PD, host.forward(request(rows)).y_PD)


def test_clients_that_wait_together_are_answered_in_one_call_and_get_their_own(
    host: Counting, server: ExpertServer, door: LeaseDoor, make: Make, way: str
) -> None:
    transports = [make() for _ in range(3)]
    assert all(transport.wait_ready(at(server), 10) for transport in transports)
    host.let_go.clear()
    host.entered.clear()
    first = transports[0].submit(at(server), request(2, seed=9))
    transports[0].flush()
    assert host.entered.wait(10)
    before = len(host.batches)
    calls = [each.submit(at(server), request(3 + seed, seed)) for seed, each in enumerate(transports)]
    limit_s = time.monotonic() + 10
    # what is written to shared memory is there at once
    while way == "nixl" and len(door._notes) < len(calls) and time.monotonic() < limit_s:
        for transport in transports:
            transport._leases[at(server)].pairing.poll()  # who waits for a write that takes its time looks
        door._look()  # in place of the loop, which is held up
    host.let_go.set()
    first_answer = first.result(10).y_PD.clone()
    answers = [call.result(10).y_PD.clone() for call in calls]
    assert host.batches[before:] == [3]
    assert torch.equal(first_answer, host.forward(request(2, seed=9)).y_PD)
    for seed, answer in enumerate(answers):
        assert torch.equal(answer, host.forward(request(3 + seed, seed)).y_PD)


def test_the_host_whose_core_this_is_is_woken_last(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = make()
    woken: list[int | None] = []

    class Lease:
        near = True

        def __init__(self, core: int | None) -> None:
            self.core = core

        def flush(self) -> None:
            woken.append(self.core)

    monkeypatch.setattr("experts.lease_transport.current_core", lambda: 1)
    for cores in ((1, 0, 2), (0, 1, None), (1,)):
        transport._held = dict.fromkeys(map(Lease, cores))  # type: ignore[arg-type]
        transport.flush()
        assert woken == sorted(cores, key=lambda core: core == 1)
        woken.clear()
        transport.flush()
        assert not woken


def test_what_was_written_wakes_the_host_with_flush_or_when_it_is_waited_for(
    host: Counting, server: ExpertServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, rung = make(), []
    assert transport.wait_ready(at(server), 10)
    ring = Pairing.ring
    pairing = transport._leases[at(server)].pairing

    def count(this: Pairing) -> None:
        if this is pairing:
            rung.append(True)
        ring(this)

    monkeypatch.setattr(Pairing, "ring", count)
    call = transport.submit(at(server), request())
    assert not rung
    transport.flush()
    transport.flush()
    assert len(rung) == 1
    call.result(10)
    call.release()
    assert len(rung) == 1
    ask(transport, at(server), request())
    assert len(rung) == 2


@pytest.mark.skipif(find_nixl() is None, reason="NIXL is not installed")
def test_no_core_is_taken_by_looking_while_near_hosts_may_need_them_all(
    host: Counting, server: ExpertServer, make: Make
) -> None:
    near, far = make(), make(machine="another machine")
    for transport, crowded in ((near, True), (far, False)):
        assert transport.wait_ready(at(server), 10)
        transport._cores = 1
        assert not transport._crowded()
        call = transport.submit(at(server), request())
        transport.flush()
        assert transport._crowded() == crowded
        transport._cores = 2
        assert not transport._crowded()
        call.result(10)
        call.release()
        transport._cores = 1
        assert not transport._crowded()


def test_threads_of_one_client_get_their_own_replies(host: Counting, server: ExpertServer, make: Make) -> None:
    transport = make()
    assert transport.wait_ready(at(server), 10)
    wrong: list[int] = []

    def work(seed: int) -> None:
        expected = host.forward(request(5, seed)).y_PD
        for _ in range(30):
            call = transport.submit(at(server), request(5, seed))
            if not torch.equal(call.result(10).y_PD, expected):
                wrong.append(seed)
            call.release()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_reply_stays_as_it_is_until_it_is_released(host: Counting, server: ExpertServer, make: Make) -> None:
    transport = make()
    assert transport.wait_ready(at(server), 10)
    kept = [transport.submit(at(server), request(4, seed)) for seed in range(SLOTS)]
    replies = [call.result(10).y_PD for call in kept]
    over = transport.submit(at(server), request(4, 77))  # no slot is left
    assert not isinstance(over, LeaseCall)
    assert torch.equal(over.result(10).y_PD, host.forward(request(4, 77)).y_PD)
    for seed, y_PD in enumerate(replies):
        assert torch.equal(y_PD, host.forward(request(4, seed)).y_PD)
    for call in kept:
        call.release()
        call.release()  # again changes nothing
    assert isinstance(transport.submit(at(server), request()), LeaseCall)


def test_calls_that_nobody_waited_for_give_their_slots_back(server: ExpertServer, make: Make) -> None:
    transport = make()
    assert transport.wait_ready(at(server), 10)
    for seed in range(3 * SLOTS):
        transport.submit(at(server), request(4, seed))  # dropped at once
        ask_again = transport.submit(at(server), request(2))
        ask_again.result(10)
        ask_again.release()
    gc.collect()
    ask(transport, at(server), request())


@pytest.mark.parametrize("rows", [64, 400])
def test_what_fits_no_slot_goes_by_grpc(host: Counting, server: ExpertServer, make: Make, rows: int) -> None:
    transport = make(slot=16 * PAGE_BYTES)
    assert transport.wait_ready(at(server), 10)
    ask(transport, at(server), request(60))
    call = transport.submit(at(server), request(rows))
    assert not isinstance(call, LeaseCall)
    assert torch.equal(call.result(10).y_PD, host.forward(request(rows)).y_PD)


def test_after_a_write_that_fails_a_host_is_paired_with_anew(
    host: Counting, server: ExpertServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.lease_transport.RETRY_S", 0.1)
    transport = make()
    assert transport.wait_ready(at(server), 10)

    def fail(*given: object) -> None:
        raise PairingFailed("the connection is gone")

    with monkeypatch.context() as broken:
        for kind in (Lane, NixlPairing):
            broken.setattr(kind, "write", fail)
        call = transport.submit(at(server), request())
    assert not isinstance(call, LeaseCall)
    assert torch.equal(call.result(10).y_PD, host.forward(request()).y_PD)
    deadline_s = time.monotonic() + 20
    while not isinstance(call, LeaseCall):
        assert time.monotonic() < deadline_s, "it went on by gRPC"
        time.sleep(0.05)
        call = transport.submit(at(server), request())
        assert torch.equal(call.result(10).y_PD, host.forward(request()).y_PD)
        call.release()


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


def test_who_is_refused_asks_less_and_less_often(host: Counting, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ExpertServer(host, token=TOKEN)  # without a door for leases
    server.start()
    transport = make()
    waits: list[float] = []
    monkeypatch.setattr("experts.lease_transport.RETRY_S", 0.01)
    for _ in range(6):
        assert not transport.wait_ready(at(server), 10)
        waits.append(transport._retry_s(at(server)))
        assert transport._leases[at(server)].join(10)
        transport._open(at(server))
    assert waits == [0.01 * 2**tries for tries in range(6)]
    monkeypatch.setattr("experts.lease_transport.RETRY_S", 1000.0)
    assert transport._retry_s(at(server)) == 300.0
    server.stop(0)


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


@pytest.mark.parametrize("token", [None, "another"])
def test_a_lease_needs_the_token(server: ExpertServer, door: LeaseDoor, make: Make, token: str | None) -> None:
    stranger = make(token=token)
    assert not stranger.wait_ready(at(server), 10)
    assert door.leases == 0
    with pytest.raises(HostUnavailable, match="token"):
        stranger.submit(at(server), request()).result(10)


def test_a_refusal_arrives_and_the_slot_is_free_again(server: ExpertServer, make: Make) -> None:
    transport = make()
    assert transport.wait_ready(at(server), 10)
    for _ in range(2 * SLOTS):
        with pytest.raises(HostRefused, match="wrong_generation"):
            ask(transport, at(server), request(generation=9))
    bad = ForwardRequest(1, 1, 1, torch.zeros(2, 256), torch.tensor([5]).int(), torch.tensor([0]).int())
    with pytest.raises(HostRefused, match="outside the 2 rows"):
        ask(transport, at(server), bad)
    assert ask(transport, at(server), request()).y_PD.shape == (4, 256)


def test_another_life_at_the_same_address_gets_no_lease(server: ExpertServer, make: Make) -> None:
    transport = make()
    assert not transport.wait_ready(Host("host-0", 2, server.address), 10)
    assert not transport.wait_ready(Host("host-1", 1, server.address), 10)


def announce(pairing: Pairing, slot: int, length: int, correlation: int) -> None:
    """Say what stands in a slot, whatever that is."""
    if isinstance(pairing, NixlPairing):
        pairing.writers[slot].post(PAGE_BYTES, NOTE.pack(slot, length, correlation))
        pairing.ring()
    else:
        pairing.write(slot, length, correlation)


def harmful_notes(pairing: Pairing) -> list[Callable[[], None]]:
    """What a client may not say, and gets no answer to."""
    if isinstance(pairing, NixlPairing):
        noise = (b"", b"noise", NOTE.pack(SLOTS, 100, 1), NOTE.pack(2**32 - 2, 100, 1), NOTE.pack(0, 0, 0) + b"x")
        return [lambda note=note: pairing.notify(note) for note in noise]  # type: ignore[misc]
    return [
        lambda: pairing.write(3, (1 << 63) - 1, 1 << 40),
        lambda: pairing.write(2, 1 << 32, (1 << 63) - 1),
        lambda: pairing.write(1, 100, 1 << 63),
        lambda: pairing.write(1, 1 << 63, (1 << 64) - 1),
    ]


def test_lies_are_refused_or_dropped_and_neighbours_unharmed(host: Counting, server: ExpertServer, make: Make) -> None:
    liar, neighbour = make(), make()
    assert liar.wait_ready(at(server), 10)
    assert neighbour.wait_ready(at(server), 10)
    lease = liar._leases[at(server)]
    arena: Arena = lease.pairing.outgoing
    expected = host.forward(request(6)).y_PD

    def lie(change: Callable[[int], tuple[int, int]], said: str) -> None:
        """Write a frame into a slot, change it, announce it, and see what comes back."""
        taken = lease.slots.take()
        assert taken is not None
        slot, correlation = taken
        length = put_request(arena.slots[slot], request(3), correlation)
        assert length is not None
        length, announced = change(slot)
        announce(lease.pairing, slot, length, announced or correlation)
        with pytest.raises(HostRefused, match=said) as caught:
            lease.wait(slot, correlation, 10)
        assert caught.value.code == "bad_request"
        assert torch.equal(ask(neighbour, at(server), request(6)).y_PD, expected)

    good = HEADER.size + 4 * (3 * 256 + 6)

    def flip(slot: int) -> tuple[int, int]:
        arena.slots[slot].frame[40] ^= 1
        return good, 0

    lie(flip, "checksum|claims|over the caps")
    lie(lambda slot: (good - 4, 0), "claims")
    lie(lambda slot: (3, 0), "3 bytes was announced")
    lie(lambda slot: (2**32 - 1, 0), "4294967295 bytes was announced")
    for harm in harmful_notes(lease.pairing):
        harm()
        assert torch.equal(ask(neighbour, at(server), request(6)).y_PD, expected)
    assert torch.equal(ask(liar, at(server), request(6)).y_PD, expected)


def test_a_killed_host_fails_its_calls_at_once_and_its_successor_is_reached(
    host: Counting, processes: Callable[..., HostProcess], make: Make
) -> None:
    first = processes()
    transport = make()
    assert transport.wait_ready(first.host, 10)
    ask(transport, first.host, request())
    first.freeze()  # so that the call is pending when it dies
    call = transport.submit(first.host, request())
    assert isinstance(call, LeaseCall)
    first.process.kill()
    started_s = time.monotonic()
    with pytest.raises(HostUnavailable, match="host-0") as caught:
        call.result(30)
    assert "no reply" not in str(caught.value)
    assert time.monotonic() - started_s < 10
    transport.forget(first.host)
    second = processes(generation=2)
    assert transport.wait_ready(second.host, 10)
    assert ask(transport, second.host, request(generation=2)).generation == 2


def test_a_frozen_host_costs_its_timeout_and_its_late_reply_spoils_nothing(
    host: Counting, processes: Callable[..., HostProcess], make: Make
) -> None:
    other = processes()
    transport = make()
    assert transport.wait_ready(other.host, 10)
    slots = transport._leases[other.host].slots
    other.freeze()
    for seed in range(SLOTS):
        call = transport.submit(other.host, request(3, seed))
        assert isinstance(call, LeaseCall)
        with pytest.raises(HostUnavailable, match=r"no reply in 0\.1 s"):
            call.result(0.1)
        call.release()
    assert slots.free == 0  # it may still write to any of them
    assert not isinstance(transport.submit(other.host, request()), LeaseCall)
    other.thaw()
    deadline_s = time.monotonic() + 20
    while slots.free < SLOTS and time.monotonic() < deadline_s:
        transport._leases[other.host].pairing.poll()
        time.sleep(0.01)
    assert slots.free == SLOTS
    for seed in (50, 51):
        wanted = host.forward(request(3, seed)).y_PD
        assert torch.equal(ask(transport, other.host, request(3, seed)).y_PD, wanted)


def test_memory_of_a_frozen_host_is_kept_until_it_lets_go(processes: Callable[..., HostProcess], make: Make) -> None:
    other = processes()
    transport = make()
    assert transport.wait_ready(other.host, 10)
    lease = transport._leases[other.host]
    other.freeze()
    transport.forget(other.host)
    assert not lease.join(0.3)  # it could be writing
    assert not transport.wait_ready(other.host, 0.1)  # nor is it paired with again meanwhile
    other.thaw()
    assert lease.join(10)
    assert transport.wait_ready(other.host, 10)


ARENA_BYTES = (SLOTS * 333 * PAGE_BYTES, (SLOTS * 333 + 1) * PAGE_BYTES)  # of slots that only the next test asks for


def footprint() -> tuple[int, int, int]:
    """Threads, open files, and the next test's arenas that are mapped.

    They are counted as objects: the system shows neighbours as one mapping, and may have others of their length.
    """
    arenas = [each for each in gc.get_objects() if type(each) is mmap.mmap and len(each) in ARENA_BYTES]
    return threading.active_count(), len(os.listdir("/proc/self/fd")), len(arenas)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("agreed", [True, False], ids=["in agreement", "without a word"])
def test_peers_that_come_and_go_leave_nothing_behind(
    server: ExpertServer, door: LeaseDoor, make: Make, agreed: bool
) -> None:
    transport = make(slot=333 * PAGE_BYTES)

    def come_and_go() -> None:
        assert transport.wait_ready(at(server), 10)
        lease = transport._leases[at(server)]
        ask(transport, at(server), request())
        if not agreed:
            lease._channel.close()  # as when the client's process ends
            assert lease.join(10)
        transport.forget(at(server))
        assert lease.join(10)

    for _ in range(5):
        come_and_go()
    time.sleep(0.5)
    threads, files, _ = footprint()
    for _ in range(20):
        come_and_go()
    deadline_s = time.monotonic() + 20
    while True:
        now = footprint()
        if now[0] <= threads + 2 and now[1] <= files + 4 and now[2] == 0 and door.leases == 0:
            return
        assert time.monotonic() < deadline_s, (now, (threads, files), door.leases)
        time.sleep(0.05)


@pytest.mark.usefixtures("uncollected")
def test_of_a_killed_host_no_memory_is_left(processes: Callable[..., HostProcess], make: Make) -> None:
    other = processes()
    transport = make(slot=333 * PAGE_BYTES)
    assert transport.wait_ready(other.host, 10)
    ask(transport, other.host, request())
    thread = transport._leases[other.host].thread
    assert footprint()[2] > 0
    other.process.kill()
    thread.join(10)
    transport.forget(other.host)
    assert not thread.is_alive()
    assert footprint()[2] == 0


def test_a_stopped_server_ends_its_leases(host: Counting, door: LeaseDoor, make: Make) -> None:
    server = ExpertServer(host, token=TOKEN, door=door)
    server.start()
    transport = make()
    assert transport.wait_ready(at(server), 10)
    lease = transport._leases[at(server)]
    server.stop(0)
    assert lease.join(10)
    with pytest.raises(HostUnavailable):
        transport.submit(at(server), request()).result(10)


def test_a_frame_over_the_caps_takes_no_slot(server: ExpertServer, make: Make) -> None:
    transport = make()
    assert transport.wait_ready(at(server), 10)
    wide = ForwardRequest(1, 1, 1, torch.empty(0, 1 << 17), torch.zeros(0).int(), torch.zeros(0).int())
    for _ in range(2 * SLOTS):
        with pytest.raises(FrameError, match="over the caps"):
            transport.submit(at(server), wide)
    assert transport._leases[at(server)].slots.free == SLOTS
