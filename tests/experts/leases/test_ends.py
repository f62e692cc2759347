"""Peers that die or freeze, and nothing left behind."""

import gc
import mmap
import os
import threading
import time
from collections.abc import Callable

import pytest
import torch

from experts.arena import PAGE_BYTES, SLOTS
from experts.errors import HostUnavailable
from experts.grpc_server import ExpertServer
from experts.lease_call import LeaseCall
from experts.lease_door import LeaseDoor
from tests.experts.host_process import HostProcess
from tests.experts.leases.rows import TOKEN, Counting, Make, ask, at, request


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
