"""What NIXL's way is made of, without NIXL: slots, frames in them, bells, patience."""

import collections
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from experts.arena import MAX_ARENA_BYTES, PAGE_BYTES, SLOTS, Arena, check_arena, slot_bytes
from experts.arena_frames import (
    get_reply,
    get_request,
    largest_frames,
    put_refusal,
    put_reply,
    put_request,
    reply_view,
)
from experts.bell import Bell, Ringer
from experts.client_slots import SlotTable
from experts.errors import FrameError, HostRefused
from experts.frames import encode_request
from experts.messages import ForwardRequest
from experts.nixl_agent import transfer_bytes
from experts.patience import LOOK_S, MAX_SKIPPED, Patience


def request(rows: int = 3, hidden: int = 8) -> ForwardRequest:
    return ForwardRequest(7, 2, 1, torch.randn(rows, hidden), torch.arange(rows).int(), torch.arange(rows).int())


def test_a_request_is_read_where_it_arrived() -> None:
    slot = Arena(PAGE_BYTES, 1).slots[0]
    sent = request()
    length = put_request(slot, sent, 5)
    assert length is not None
    read = get_request(slot, length, 5)
    assert torch.equal(read.x_RD, sent.x_RD)
    assert (read.epoch, read.generation, read.layer) == (7, 2, 1)
    slot.floats[0] = 99.0
    assert read.x_RD[0, 0] == 99.0  # a view
    slot.ints[:] = -1
    assert read.pair_row_P.tolist() == read.pair_expert_P.tolist() == [0, 1, 2]  # read once, so checked once


def test_a_reply_is_computed_where_it_is_sent_from() -> None:
    slot = Arena(PAGE_BYTES, 1).slots[0]
    y_PD = reply_view(slot, 4, 8)
    assert y_PD is not None
    y_PD.copy_(torch.randn(4, 8))
    read = get_reply(slot, put_reply(slot, 3, 4, 8, 9), 9)
    assert read.generation == 3
    assert torch.equal(read.y_PD, y_PD)
    assert read.y_PD.data_ptr() == y_PD.data_ptr()


def test_what_does_not_fit_is_not_written() -> None:
    slot = Arena(PAGE_BYTES, 1).slots[0]
    assert put_request(slot, request(rows=200), 5) is None
    assert reply_view(slot, 200, 8) is None


def test_a_refusal_is_cut_to_its_slot() -> None:
    slot = Arena(PAGE_BYTES, 1).slots[0]
    length = put_refusal(slot, HostRefused("bad_request", "x" * 9999), 5)
    assert length == PAGE_BYTES
    with pytest.raises(HostRefused, match="xxxx") as caught:
        get_reply(slot, length, 5)
    assert caught.value.code == "bad_request"


def test_a_slot_that_lies_is_named() -> None:
    slot = Arena(PAGE_BYTES, 1).slots[0]
    length = put_request(slot, request(), 5)
    assert length is not None
    for wrong, said in (
        (0, "announced"),
        (PAGE_BYTES + 1, "announced"),
        (length - 4, "claims"),
        (length + 4, "claims"),
    ):
        with pytest.raises(FrameError, match=said):
            get_request(slot, wrong, 5)
    with pytest.raises(FrameError, match="call 6 was announced; the slot holds a frame of call 5"):
        get_request(slot, length, 6)
    for byte in range(60):
        slot.frame[byte] ^= 4
        with pytest.raises(FrameError):
            get_request(slot, length, 5)
        slot.frame[byte] ^= 4
    get_request(slot, length, 5)


def test_a_frame_of_a_stream_is_none_of_a_slot() -> None:
    slot = Arena(PAGE_BYTES, 1).slots[0]
    frame = encode_request(request(), 5)
    slot.frame[: len(frame)] = frame
    with pytest.raises(FrameError, match="coverage is 0; expected 1"):
        get_request(slot, len(frame), 5)


@pytest.mark.parametrize(
    ("size", "count", "said"),
    [
        (0, 1, "0 bytes"),
        (100, 1, "multiple of"),
        (PAGE_BYTES, 0, "0 slots"),
        (PAGE_BYTES, 99, "99 slots"),
        (MAX_ARENA_BYTES, 2, "the cap of an arena"),
    ],
)
def test_an_arena_over_the_caps_is_refused(size: int, count: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_arena(size, count)


def test_slots_hold_the_largest_step_or_as_much_as_they_may() -> None:
    sent, replied = largest_frames(step_tokens=512, top_k=6, hidden=2048)
    assert slot_bytes(sent) >= 512 * 2048 * 4 + 2 * 512 * 6 * 4
    assert slot_bytes(replied) >= 512 * 6 * 2048 * 4
    check_arena(slot_bytes(replied), SLOTS)
    check_arena(slot_bytes(1 << 40), SLOTS)


@pytest.mark.parametrize("length", [1, 64, 4096, 4097, 65536 + 192, 524288 + 7, 1 << 20, (1 << 20) + 1])
def test_transfers_are_rounded_up_by_little(length: int) -> None:
    assert length <= transfer_bytes(length) <= max(length * 17 // 16, length + PAGE_BYTES)


def test_few_sizes_of_transfers_are_kept() -> None:
    assert len({transfer_bytes(length) for length in range(1, (1 << 20) + 1, 64)}) <= 100


def test_an_abandoned_slot_is_free_only_after_its_late_reply() -> None:
    table = SlotTable(1)
    taken = table.take()
    assert taken is not None
    slot, correlation = taken
    table.abandon(slot)
    assert table.take() is None
    assert not table.answer(slot, 100, correlation + 1)
    assert table.take() is None
    assert not table.answer(slot, 100, correlation)  # nobody waits, but the slot is back
    again = table.take()
    assert again is not None
    assert again[1] != correlation
    assert not table.answer(slot, 100, correlation)  # of the call before
    assert table.length(slot) <= 0


def test_a_reply_for_a_slot_that_does_not_exist_is_dropped() -> None:
    table = SlotTable(2)
    assert not table.answer(2, 100, 0)
    assert not table.answer(0, 100, 0)  # free
    assert table.free == 2


def test_a_dropped_call_gives_its_slot_back_when_answered() -> None:
    table = SlotTable(1)
    taken = table.take()
    assert taken is not None
    table.answer(taken[0], 100, taken[1])
    table.drop(taken[0])
    assert table.take() is not None


def test_threads_that_give_dropped_slots_back_at_once_do_not_fail() -> None:
    table = SlotTable(1)

    class Contested(collections.deque[int]):
        def popleft(self) -> int:
            self.clear()  # as another thread does that saw the same
            return super().popleft()

    table._dropped = Contested([0])
    assert table.take() is not None


def test_a_bell_wakes_and_what_was_there_before_is_seen() -> None:
    bell = Bell()
    bell.ring()  # nobody sleeps: not sent
    started_s = time.monotonic()
    bell.wait(20, lambda: True)
    threading.Timer(0.1, bell.ring).start()
    bell.wait(20, lambda: False)
    assert time.monotonic() - started_s < 10
    bell.close()


def test_a_bell_in_another_process_is_rung() -> None:
    bell = Bell()
    script = f"from experts.bell import Ringer\nimport time\nr = Ringer({bell.address!r})\ntime.sleep(0.1)\nr.ring()"
    started_s = time.monotonic()
    ringer = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent.parent.parent)
    bell.wait(20, lambda: False)
    assert time.monotonic() - started_s < 15
    assert ringer.wait(10) == 0
    bell.close()


def test_a_bell_says_on_which_core_it_will_wake() -> None:
    here = min(os.sched_getaffinity(0))
    bell = Bell()
    ringer = Ringer(bell.address)

    def sleep() -> None:
        os.sched_setaffinity(0, {here})  # of this thread alone
        bell.wait(0.01, lambda: False)

    for core in sorted(os.sched_getaffinity(0)):
        here = core
        sleeper = threading.Thread(target=sleep)
        sleeper.start()
        sleeper.join(20)
        assert ringer.core == core
    bell.close()
    assert Ringer(bell.address).core is None  # it is gone


@pytest.mark.parametrize("address", ["", "shoal", "/etc/passwd", "shoal-" + "0" * 32 + "/1/../../etc/passwd"])
def test_what_is_no_bells_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="no address of shared memory"):
        Ringer(address)


def test_a_bell_that_is_gone_hears_nothing() -> None:
    bell = Bell()
    ringer = Ringer(bell.address)
    bell.close()
    ringer.ring()
    ringer.close()


def test_patience_looks_while_that_helps_and_seldom_where_it_does_not() -> None:
    patience = Patience()
    for _ in range(5):
        assert patience.look_s == LOOK_S
        patience.waited(slept=False)
    looks = 0
    for _ in range(1000):
        looks += patience.look_s == LOOK_S
        patience.waited(slept=True)
    assert looks < 30
    for _ in range(MAX_SKIPPED):
        patience.waited(slept=False)
    assert patience.look_s == LOOK_S
