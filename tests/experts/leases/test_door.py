"""A host's door: whom it makes no room for, and what it says of it."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import grpc
import pytest

from experts.arena import MAX_ARENA_BYTES, MAX_SLOTS, PAGE_BYTES, SLOTS
from experts.grpc_server import ExpertServer
from experts.host_lease import HostLease
from experts.host_loop import MAX_SLEEP_S
from experts.lane import Lane, lanes_serve
from experts.lease import (
    METHOD,
    NOTE,
    VERSION,
    Accept,
    Granted,
    Hello,
    LeaseRefused,
    NixlEnd,
    SharedEnd,
    decode,
    encode,
)
from experts.lease_door import LeaseDoor
from experts.transport_kinds import Ways
from experts.wire import TOKEN_KEY, identity
from tests.experts.leases.rows import TOKEN, Counting

pytestmark = pytest.mark.skipif(not lanes_serve(), reason="no native kernels are built")
SHARED = Ways(shared=True, nixl=False)


def hello(**changed: object) -> Hello:
    given = {
        "version": VERSION,
        "machine": "here",
        "slots": SLOTS,
        "request_bytes": PAGE_BYTES,
        "reply_bytes": 2 * PAGE_BYTES,
        "shared": True,
        "nixl": False,
    }
    return Hello(**(given | changed))  # type: ignore[arg-type]


@pytest.fixture
def here() -> Iterator[LeaseDoor]:
    """A door that gives memory of this machine only."""
    made = LeaseDoor("host-0", 3, SHARED, "here")
    yield made
    for lease in tuple(made._leases):
        made.end(lease)
    made.close()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": VERSION - 1}, f"version is {VERSION - 1}; this host speaks {VERSION}"),
        ({"request_bytes": PAGE_BYTES + 1}, f"expected a positive multiple of {PAGE_BYTES}"),
        ({"reply_bytes": PAGE_BYTES - 1}, f"expected a positive multiple of {PAGE_BYTES}"),
        ({"request_bytes": MAX_ARENA_BYTES // 2, "slots": 4}, "the cap of an arena"),
        ({"reply_bytes": MAX_ARENA_BYTES // 2, "slots": 4}, "the cap of an arena"),
        ({"machine": "elsewhere"}, "no way but gRPC"),
        ({"shared": False}, "no way but gRPC"),
        ({"machine": "elsewhere", "nixl": True}, "no way but gRPC"),
    ],
)
def test_what_cannot_be_given_is_refused_and_takes_no_memory(
    here: LeaseDoor, changed: dict[str, object], said: str
) -> None:
    with pytest.raises(LeaseRefused, match=said):
        here.offer(hello(**changed))
    assert here.leases == 0
    _, offer = here.offer(hello())
    assert (offer.host, offer.generation, offer.near, offer.end.way) == ("host-0", 3, True, "shared")


def test_a_door_gives_no_more_leases_and_no_more_memory_than_its_caps(
    here: LeaseDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.lease_door.MAX_LEASES", 2)
    first, _ = here.offer(hello())
    here.offer(hello())
    with pytest.raises(LeaseRefused, match="its caps are 2 leases"):
        here.offer(hello())
    here.end(first)
    assert here.leases == 1
    monkeypatch.setattr("experts.lease_door.MAX_LEASES", 9)
    monkeypatch.setattr("experts.lease_door.MAX_LEASED_BYTES", 2 * SLOTS * 3 * PAGE_BYTES)
    here.offer(hello())  # the last that fits
    with pytest.raises(LeaseRefused, match=f"{SLOTS * 3 * PAGE_BYTES} more are wanted"):
        here.offer(hello())


def test_as_many_slots_as_a_lane_has_lines_are_given(here: LeaseDoor) -> None:
    lease, _ = here.offer(hello(slots=MAX_SLOTS))
    assert len(lease.pairing.incoming.slots) == MAX_SLOTS


def test_a_client_that_answers_by_another_way_than_was_offered_is_refused(here: LeaseDoor) -> None:
    lease, _ = here.offer(hello())
    with pytest.raises(LeaseRefused, match="another way than nixl was offered"):
        here.accept(lease, Accept(end=NixlEnd(agent="a", metadata=b"", bell=None, address=0)))
    assert not lease.connected
    assert here._lanes.leases == []


def test_a_client_whose_memory_cannot_be_mapped_is_refused(here: LeaseDoor) -> None:
    lease, _ = here.offer(hello())
    gone = SharedEnd(memory=f"shoal-{'0' * 32}/1/2", bell=f"shoal-{'0' * 32}/1/3")
    with pytest.raises(LeaseRefused, match="cannot be mapped"):
        here.accept(lease, Accept(end=gone))
    assert not lease.connected


def granted(door: LeaseDoor, lease: HostLease, offered: SharedEnd, notes: list[bytes]) -> Lane:
    """The client's end of a lease by shared memory."""
    client = Lane(2 * PAGE_BYTES, SLOTS)
    client.connect("host-0", offered.memory, PAGE_BYTES, offered.bell, notes.append)
    door.accept(lease, Accept(end=SharedEnd(memory=client.memory, bell=offered.bell)))
    return client


def test_a_client_that_is_gone_is_not_looked_at_any_more(here: LeaseDoor) -> None:
    lease, offer = here.offer(hello())
    assert isinstance(offer.end, SharedEnd)
    client = granted(here, lease, offer.end, [])
    assert here._lanes.leases == [lease]
    here.end(lease)
    client.write(0, 100, 1)
    assert here.poll() == ()
    assert here._lanes.leases == []
    assert lease.job(NOTE.pack(0, 100, 1)) is None


def test_nothing_is_written_to_a_client_that_is_gone(here: LeaseDoor) -> None:
    lease, offer = here.offer(hello())
    assert isinstance(offer.end, SharedEnd)
    notes: list[bytes] = []
    client = granted(here, lease, offer.end, notes)
    lease.send(0, 100, 1)
    assert client.poll() == 1
    here.end(lease)
    lease.send(1, 100, 2)
    assert client.poll() == 0
    assert notes == [NOTE.pack(0, 100, 1)]


@pytest.mark.parametrize(("near", "longest_s"), [(True, 50e-3), (False, 20e-3)])
def test_a_host_with_nothing_to_do_looks_ever_more_seldom(here: LeaseDoor, near: bool, longest_s: float) -> None:
    """Of whoever writes by NIXL: looking as often as it does at first, it would take a core."""
    assert here._pause_s(0.0) == MAX_SLEEP_S
    lease = SimpleNamespace(pairing=SimpleNamespace(near=near))
    here._leases = [lease]  # type: ignore[list-item]
    pauses_s = [here._pause_s(idle_s) for idle_s in (0.0, 0.01, 0.5, 1.0, 3600.0)]
    assert pauses_s == sorted(pauses_s)
    assert pauses_s[0] <= (5e-3 if near else 20e-6)  # a near one's bell wakes it
    assert pauses_s[3:] == [longest_s, longest_s]
    here._leases = []


@pytest.fixture
def say(host: Counting, server: ExpertServer) -> Iterator[Callable[..., list[bytes]]]:
    """What the host answers to messages on a lease's stream; raises grpc.RpcError where it ends it with one."""
    with grpc.insecure_channel(server.address) as channel:
        stream = channel.stream_stream(METHOD, identity, identity)

        def send(messages: Iterator[bytes]) -> list[bytes]:
            return list(stream(messages, metadata=((TOKEN_KEY, TOKEN),), timeout=10))

        yield send


@pytest.mark.parametrize(
    ("first", "said"), [(b"", "lease message Hello"), (encode(hello(version=VERSION + 1)), "this host speaks")]
)
def test_the_reason_for_a_refusal_arrives(
    say: Callable[..., list[bytes]], door: LeaseDoor, first: bytes, said: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        say(iter([first]))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert said in refused.value.details()
    assert door.leases == 0


@pytest.mark.parametrize("way", ["shared"], indirect=True)
def test_after_its_grant_a_client_has_nothing_more_to_say(say: Callable[..., list[bytes]], door: LeaseDoor) -> None:
    lane = Lane(2 * PAGE_BYTES, SLOTS)
    bell = door._bell.address
    accept = encode(Accept(end=SharedEnd(memory=lane.memory, bell=bell)))
    greeting = encode(hello(machine=door._machine))
    _, last = say(iter([greeting, accept]))
    assert decode(Granted, last).granted
    assert door.leases == 0  # it half-closed the stream
    with pytest.raises(grpc.RpcError) as refused:
        say(iter([greeting, accept, b"more"]))
    assert "nothing is expected after Accept but the end" in refused.value.details()
    assert door.leases == 0
    lane.close()
