"""The two ends of a lane, without a service: what native code writes and Python reads, and the other way round."""

import ctypes
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.arena import PAGE_BYTES, SLOTS
from experts.arena_frames import get_request, put_reply, reply_view
from experts.bell import Bell
from experts.client_slots import SlotTable
from experts.flight import Flight, Lanes, take_off
from experts.frames import HEADER
from experts.lane import Lane, lanes_serve
from experts.pairing import PairingFailed
from experts.shared_memory import SharedMemory, map_shared
from kernels.lane import LEG, NativeLane
from router.placement import Host

pytestmark = pytest.mark.skipif(not lanes_serve(), reason="no native kernels are built")
SLOT_BYTES = 16 * PAGE_BYTES


class Ends:
    """A client's lane and a host's, of one process."""

    def __init__(self) -> None:
        self.client, self.host = Lane(SLOT_BYTES, SLOTS), Lane(SLOT_BYTES, SLOTS)
        self.client.connect("the host", self.host.memory, SLOT_BYTES, None, lambda note: None)
        self.host.connect("the client", self.client.memory, SLOT_BYTES, None, lambda note: None)


class Leased:
    """As much of a lease as a flight uses."""

    ready = True

    def __init__(self, ends: Ends) -> None:
        self.lane, self.slots = ends.client, SlotTable(SLOTS)

    def take(self) -> tuple[int, int] | None:
        return self.slots.take()


def fly(x_TD: Tensor, experts_TK: Tensor) -> tuple[Ends, Flight]:
    ends = Ends()
    lanes = Lanes((Host("host-0", 7, ""),), [Leased(ends)], Bell(), 2)  # type: ignore[list-item]
    owner_E = torch.zeros(16, dtype=torch.int32)
    flight = take_off(lanes, owner_E, 3, 11, x_TD, experts_TK, None, 0.0)
    assert flight is not None
    return ends, flight


def line(ends: Ends) -> tuple[int, int, int]:
    """Slot, length and correlation of what was announced to the host last."""
    words = ends.host.incoming.address - PAGE_BYTES
    for slot in range(SLOTS):
        correlation, length = (ctypes.c_uint64 * 2).from_address(words + 64 * slot)
        if correlation:
            return slot, length, correlation
    raise AssertionError("nothing was announced")


def test_native_frames_are_those_of_python() -> None:
    experts_TK = torch.tensor([[3, 5], [9, 3], [1, 0]])
    x_TD = torch.randn(3, 8)
    ends, flight = fly(x_TD, experts_TK)
    slot, length, correlation = line(ends)
    request = get_request(ends.host.incoming.slots[slot], length, correlation)
    assert (request.layer, request.epoch, request.generation) == (3, 11, 7)
    assert torch.equal(request.x_RD, x_TD)
    assert request.pair_row_P.tolist() == [0, 0, 1, 1, 2, 2]
    assert request.pair_expert_P.tolist() == experts_TK.flatten().tolist()
    header = bytes(ends.host.incoming.slots[slot].frame[:56])
    assert zlib.crc32(header) == int.from_bytes(ends.host.incoming.slots[slot].frame[56:60], "little")

    y_PD = reply_view(ends.host.outgoing.slots[slot], 6, 8)
    assert y_PD is not None
    y_PD.copy_(torch.randn(6, 8))
    answered = y_PD.clone()
    ends.host.write(slot, put_reply(ends.host.outgoing.slots[slot], 7, 6, 8, correlation), correlation)
    weights_TK = torch.rand(3, 2)
    out_TD = flight.land(weights_TK, None, None, 1)
    assert out_TD is not None
    assert torch.allclose(out_TD, (answered.view(3, 2, 8) * weights_TK[..., None]).sum(1))


@pytest.mark.parametrize("byte", range(60))
def test_a_reply_that_is_damaged_is_not_landed(byte: int) -> None:
    ends, flight = fly(torch.randn(2, 8), torch.tensor([[3, 5], [9, 3]]))
    slot, _, correlation = line(ends)
    place = ends.host.outgoing.slots[slot]
    length = put_reply(place, 7, 4, 8, correlation)
    place.frame[byte] ^= 1
    ends.host.write(slot, length, correlation)
    assert flight.land(torch.rand(2, 2), None, None, 1) is None
    place.frame[byte] ^= 1
    assert flight.land(torch.rand(2, 2), None, None, 1) is not None


@pytest.mark.parametrize(
    ("generation", "pairs", "hidden", "length"),
    [(6, 4, 8, None), (7, 3, 8, None), (7, 4, 7, None), (7, 4, 8, 10), (7, 4, 8, 1 << 40), (7, 8, 4, None)],
)
def test_a_reply_of_another_life_or_shape_is_not_landed(
    generation: int, pairs: int, hidden: int, length: int | None
) -> None:
    ends, flight = fly(torch.randn(2, 8), torch.tensor([[3, 5], [9, 3]]))
    slot, _, correlation = line(ends)
    written = put_reply(ends.host.outgoing.slots[slot], generation, pairs, hidden, correlation)
    ends.host.write(slot, written if length is None else length, correlation)
    assert flight.land(torch.rand(2, 2), None, None, 1) is None


def test_a_lane_that_is_over_is_not_waited_for() -> None:
    ends, flight = fly(torch.randn(2, 8), torch.tensor([[3, 5], [9, 3]]))
    ends.client.end()
    began_s = time.monotonic()
    assert flight.land(torch.rand(2, 2), None, None, 10) is None
    assert time.monotonic() - began_s < 5


def test_who_waits_at_a_lane_looks_up_when_it_is_closed() -> None:
    ends, flight = fly(torch.randn(2, 8), torch.tensor([[3, 5], [9, 3]]))
    began_s = time.monotonic()
    closing = threading.Timer(0.05, ends.client.close)
    closing.start()
    assert flight.land(torch.rand(2, 2), None, None, 10) is None
    assert time.monotonic() - began_s < 5
    closing.join()


def test_memory_that_could_shrink_or_is_too_small_is_not_mapped() -> None:
    small = SharedMemory(PAGE_BYTES)
    assert map_shared(small.address, PAGE_BYTES) is not None
    assert map_shared(small.address, 2 * PAGE_BYTES) is None
    name = "shoal-" + "0" * 32
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(file, PAGE_BYTES)
    assert map_shared(f"{name}/{os.getpid()}/{file}", PAGE_BYTES) is None
    os.close(file)
    with pytest.raises(PairingFailed, match="cannot be mapped"):
        Lane(SLOT_BYTES, SLOTS).connect("the host", small.address, SLOT_BYTES, None, lambda note: None)
    silent = Bell()
    silent.close()
    large = SharedMemory(SLOT_BYTES * SLOTS + PAGE_BYTES)
    with pytest.raises(PairingFailed, match="the bell of the host cannot be mapped"):
        Lane(SLOT_BYTES, SLOTS).connect("the host", large.address, SLOT_BYTES, silent.address, lambda note: None)
    with pytest.raises(PairingFailed, match="no address"):
        Lane(SLOT_BYTES, SLOTS).connect("the host", "/etc/passwd", SLOT_BYTES, None, lambda note: None)


def test_memory_that_is_forgotten_leaves_no_file_open() -> None:
    def ours() -> int:
        links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return sum("memfd:shoal" in os.readlink(link) for link in links if link.is_symlink())

    before = ours()
    kept = SharedMemory(PAGE_BYTES)
    address, memory = kept.address, kept.memory
    assert map_shared(address, PAGE_BYTES) is not None
    kept.close()
    kept.close()
    assert map_shared(address, PAGE_BYTES) is None
    memory[0] = 7  # which stays mapped
    del kept, memory
    assert ours() == before
    assert SharedMemory(PAGE_BYTES).memory[0] == 0  # forgotten at once
    assert ours() == before


def test_native_code_and_python_mean_the_same_bytes() -> None:
    assert NativeLane.over.offset == 64
    assert NativeLane.seen.offset == 72
    assert HEADER.size == 64
    assert LEG == 6


WANDERING = """
import ctypes, sys
from experts.shared_memory import map_shared
words = (ctypes.c_uint32 * 4).from_buffer(map_shared(sys.argv[1], 4096))
print("there", flush=True)
while True:
    for core in map(int, sys.argv[2:]):
        words[2] = core
"""


def test_a_host_that_wakes_now_here_now_there_is_woken_each_time() -> None:
    """Whoever sleeps on the sender's core is woken last, and is not missed when it is elsewhere by then."""
    cores = sorted(os.sched_getaffinity(0))
    ends, bell = Ends(), Bell()
    ends.client._hear(bell.address)
    ends.client.native.bell = bell.page
    lanes = Lanes((Host("host-0", 7, ""),), [Leased(ends)], Bell(), 2)  # type: ignore[list-item]
    owner_E, x_TD, experts_TK = torch.zeros(16, dtype=torch.int32), torch.randn(1, 8), torch.tensor([[3]])
    bell._page.asleep = True
    command = [sys.executable, "-c", WANDERING, bell.address, str(cores[0]), str(cores[-1])]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE) as host:
        try:
            assert host.stdout is not None
            assert host.stdout.readline()
            for _ in range(5000):
                before = bell.rings
                flight = take_off(lanes, owner_E, 3, 11, x_TD, experts_TK, None, 0.0)
                assert flight is not None
                for *_, call in flight.calls():
                    lanes.leases[0].slots.answer(call._slot, 1, call._correlation)
                    call.release()
                assert bell.rings > before
        finally:
            host.kill()
