"""How a client opens its lease at a host: what is said, and the memory that both map, or the peers that they become."""

import time
from collections.abc import Callable, Iterator

from experts.arena import SLOTS, Arena
from experts.lane import Lane
from experts.lease import (
    NOTE,
    PING,
    VERSION,
    Accept,
    Granted,
    Hello,
    LeaseRefused,
    Message,
    NixlEnd,
    Offer,
    SharedEnd,
)
from experts.lease import decode as decode_message
from experts.lease import encode as encode_message
from experts.lease_settings import LeaseSettings
from experts.nixl_pairing import NixlPairing
from experts.pairing import Pairing, PairingFailed
from router.placement import Host

CONNECT_S = 5.0
CONNECT_POLL_S = 200e-6


class LeaseOpening:
    """One attempt, by one thread. What it has made by its end, also a bad one, is to be closed."""

    def __init__(
        self,
        host: Host,
        settings: LeaseSettings,
        say: Callable[[bytes], None],
        answer: Callable[[int, int, int], object],
        unwanted: Callable[[], bool],
    ) -> None:
        """`say` sends the host a message, `answer` takes slot, length and correlation of each reply that comes."""
        self._host = host
        self._settings = settings
        self._say = say
        self._answer = answer
        self._unwanted = unwanted
        self._pinged = False
        self.lane: Lane | None = None
        self.unshareable = False  # whether the host's memory cannot be mapped here
        self._pairing: NixlPairing | None = None

    def run(self, messages: Iterator[bytes]) -> Pairing:
        """Raises LeaseRefused, PairingFailed, NixlMissing, and what `messages`, the host's, raises."""
        settings = self._settings
        hello = Hello(
            version=VERSION,
            machine=settings.machine,
            slots=SLOTS,
            request_bytes=settings.request_bytes,
            reply_bytes=settings.reply_bytes,
            shared=settings.shared,
            nixl=settings.nixl,
        )
        self._say(encode_message(hello))
        offer = _receive(Offer, messages)
        if (offer.host, offer.generation) != (self._host.id, self._host.generation):
            raise LeaseRefused(f"{offer.host} of generation {offer.generation} answers at {self._host.address}")
        if isinstance(offer.end, SharedEnd):
            return self._share(offer.end, messages)
        return self._pair(offer.end, offer.near, messages)

    def close(self) -> None:
        """The host writes no more: nobody looks at what it wrote either, and the memory may go."""
        if self.lane is not None:
            self.lane.close()
        if self._pairing is not None:
            self._pairing.close()

    def _share(self, end: SharedEnd, messages: Iterator[bytes]) -> Lane:
        self.lane = lane = Lane(self._settings.reply_bytes, SLOTS)
        try:
            lane.connect(self._host.id, end.memory, self._settings.request_bytes, end.bell, self._on_note)
        except PairingFailed:
            self.unshareable = True
            raise
        accept = Accept(end=SharedEnd(memory=lane.memory, bell=self._settings.bell.address))
        self._say(encode_message(accept))
        _receive(Granted, messages)
        return lane

    def _pair(self, end: NixlEnd, near: bool, messages: Iterator[bytes]) -> NixlPairing:
        settings = self._settings
        outgoing, incoming = Arena(settings.request_bytes, SLOTS), Arena(settings.reply_bytes, SLOTS)
        self._pairing = pairing = NixlPairing(settings.agent(near), near, outgoing, incoming)
        pairing.connect(end.agent, end.metadata, end.address, end.bell, self._on_note)
        accept = NixlEnd(
            agent=pairing.agent.name,
            metadata=pairing.metadata,
            bell=settings.bell.address if near else None,
            address=incoming.address,
        )
        self._say(encode_message(Accept(end=accept)))
        _receive(Granted, messages)
        self._ping(pairing)
        return pairing

    def _ping(self, pairing: NixlPairing) -> None:
        """One note there and back: the first takes a connection's making, and no call should wait for that."""
        pairing.notify(NOTE.pack(PING, 0, 0))
        deadline_s = time.monotonic() + CONNECT_S
        while not self._pinged:
            if time.monotonic() > deadline_s or self._unwanted():
                raise LeaseRefused(f"{self._host.id} did not answer by NIXL in {CONNECT_S:.0f} s")
            if pairing.poll():
                self._settings.bell.ring_others()
            time.sleep(CONNECT_POLL_S)

    def _on_note(self, note: bytes) -> None:
        if len(note) != NOTE.size:
            return
        slot, length, correlation = NOTE.unpack(note)
        if slot == PING:
            self._pinged = True
        else:
            self._answer(slot, length, correlation)


def _receive(kind: type[Message], messages: Iterator[bytes]) -> Message:
    message = next(messages, None)
    if message is None:
        raise LeaseRefused("the host ended the lease while it was made")
    return decode_message(kind, message)
