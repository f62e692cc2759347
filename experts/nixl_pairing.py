"""A pairing by NIXL: one-sided writes into registered memory, and notes that come with them."""

import time

from experts.arena import Arena
from experts.lease import NOTE
from experts.nixl_agent import NixlAgent, NixlFailed, OnMessage, SlotWriter
from experts.pairing import Pairing

WRITE_OUT_S = 1.0  # for writes under way when it ends
POLL_S = 1e-3


class NixlPairing(Pairing):
    """Raises NixlFailed when memory cannot be registered."""

    def __init__(self, agent: NixlAgent, near: bool, outgoing: Arena, incoming: Arena) -> None:
        super().__init__()
        self.agent = agent
        self.near = near
        self.outgoing = outgoing
        self.incoming = incoming
        self.writers: tuple[SlotWriter, ...] = ()
        self._registrations = [agent.register(incoming)]
        self._registrations.append(agent.register(outgoing))

    def metadata(self) -> bytes:
        """What the peer needs to write into `incoming`, and nothing else of ours."""
        return self.agent.metadata(self._registrations[0])

    def connect(self, peer: str, metadata: bytes, address: int, bell: str | None, on_note: OnMessage) -> None:
        """Know the peer, whose slots begin at `address`; raises PairingFailed when its metadata lies."""
        self._hear(bell if self.near else None)
        self.agent.add_peer(peer, metadata, on_note)
        self.peer = peer
        size = self.outgoing.slot_bytes
        self.writers = tuple(
            self.agent.writer(peer, slot, address + index * size, self._on_sent)
            for index, slot in enumerate(self.outgoing.slots)
        )

    def poll(self) -> int:
        return self.agent.poll()

    def write(self, slot: int, length: int, correlation: int) -> None:
        self.writers[slot].post(length, NOTE.pack(slot, length, correlation))

    def busy(self, slot: int) -> bool:
        return self.writers[slot].busy

    def notify(self, note: bytes) -> None:
        """Send a note alone; raises NixlFailed when the peer is gone."""
        self.agent.notify(self.peer, note)
        self.ring()

    def close(self) -> None:
        deadline_s = time.monotonic() + WRITE_OUT_S
        while any(writer.busy for writer in self.writers) and time.monotonic() < deadline_s:
            try:
                self.agent.poll()
            except NixlFailed:
                break
            time.sleep(POLL_S)
        for writer in self.writers:
            writer.close()
        if self.peer:
            self.agent.remove_peer(self.peer)
        for registration in self._registrations:
            self.agent.deregister(registration)
        if self._ringer is not None:
            self._ringer.close()
