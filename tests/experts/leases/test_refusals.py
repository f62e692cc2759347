"""Who is refused, and peers that lie."""

import time
from collections.abc import Callable

import pytest
import torch

from experts.arena import PAGE_BYTES, SLOTS, Arena
from experts.arena_frames import put_request
from experts.errors import FrameError, HostRefused, HostUnavailable
from experts.frames import HEADER
from experts.grpc_server import ExpertServer
from experts.lane import Lane
from experts.lease import NOTE
from experts.lease_call import LeaseCall
from experts.lease_door import LeaseDoor
from experts.messages import ForwardRequest
from experts.nixl_pairing import NixlPairing
from experts.pairing import Pairing, PairingFailed
from router.placement import Host
from tests.experts.leases.rows import TOKEN, Counting, Make, ask, at, request


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
        with pytest.raises(HostRefused, match=r"^wrong_generation: "):
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


def test_a_reply_that_fits_no_slot_of_the_client_is_refused(server: ExpertServer, make: Make) -> None:
    """A client asks for none; one that does gets no write beyond its memory."""
    transport = make(slot=16 * PAGE_BYTES)
    assert transport.wait_ready(at(server), 10)
    lease = transport._leases[at(server)]
    taken = lease.slots.take()
    assert taken is not None
    slot, correlation = taken
    rows, experts = torch.arange(96).int() % 4, torch.arange(96).int() % 16
    many = ForwardRequest(1, 1, 1, torch.randn(4, 256), rows, experts)
    length = put_request(lease.pairing.outgoing.slots[slot], many, correlation)
    assert length is not None
    announce(lease.pairing, slot, length, correlation)
    with pytest.raises(HostRefused, match="96 rows of 256 do not fit the 65536 bytes of a reply"):
        lease.wait(slot, correlation, 10)
    assert ask(transport, at(server), request()).y_PD.shape == (4, 256)


def test_a_frame_over_the_caps_takes_no_slot(server: ExpertServer, make: Make) -> None:
    transport = make()
    assert transport.wait_ready(at(server), 10)
    wide = ForwardRequest(1, 1, 1, torch.empty(0, 1 << 17), torch.zeros(0).int(), torch.zeros(0).int())
    for _ in range(2 * SLOTS):
        with pytest.raises(FrameError, match="over the caps"):
            transport.submit(at(server), wide)
    assert transport._leases[at(server)].slots.free == SLOTS
