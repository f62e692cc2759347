"""Calls by lease: the same bits, answered together, and slots that come back."""

import gc
import threading
import time
from collections.abc import Callable

import pytest
import torch

from experts.arena import SLOTS
from experts.grpc_server import ExpertServer
from experts.lease_call import LeaseCall
from experts.lease_door import LeaseDoor
from experts.nixl import find_nixl
from experts.pairing import Pairing
from tests.experts.host_process import HostProcess
from tests.experts.leases.rows import Counting, Make, ask, at, request

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
