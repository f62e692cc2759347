"""A pairing by NIXL: one-sided writes into registered memory, and notes that come with them."""

import logging
import time
from typing import Any

from experts.arena import Arena
from experts.lease import NOTE
from experts.nixl_agent import NixlAgent, NixlFailed, OnMessage, SlotWriter
from experts.pairing import Pairing

WRITE_OUT_S = 1.0  # for writes under way when it ends
POLL_S = 1e-3
log = logging.getLogger("shoal.experts")


class NixlPairing(Pairing):
    """Raises NixlFailed when memory cannot be registered."""

    def __init__(self, agent: NixlAgent, near: bool, outgoing: Arena, incoming: Arena) -> None:
        super().__init__()
        self.agent = agent
        self.near = near
        self.outgoing = outgoing
        self.incoming = incoming
        self.writers: tuple[SlotWriter, ...] = ()
        self._registrations: list[Any] = []
        try:
            for arena in (incoming, outgoing):
                self._registrations.append(agent.register(arena))
            # what the peer needs to write into `incoming`, and nothing else of ours
            self.metadata = agent.metadata(self._registrations[0])
        except NixlFailed:
            self._deregister()
            raise

    def connect(self, peer: str, metadata: bytes, address: int, bell: str | None, on_note: OnMessage) -> None:
        """Know the peer, whose slots begin at `address`; raises PairingFailed when its metadata lies."""
        self._hear(bell if self.near else None)
        size = self.outgoing.slot_bytes
        # first: from `add_peer` on, another thread that polls may be told of what needs them
        self.writers = tuple(
            self.agent.writer(peer, slot, address + index * size, self._on_sent)
            for index, slot in enumerate(self.outgoing.slots)
        )
        self.agent.add_peer(peer, metadata, on_note)
        self.peer = peer

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
        self._deregister()
        if self._ringer is not None:
            self._ringer.close()

    def _deregister(self) -> None:
        """Once; one that NIXL does not let go keeps nobody from ending this."""
        registrations, self._registrations = self._registrations, []
        for registration in registrations:
            try:
                self.agent.deregister(registration)
            except NixlFailed as error:
                log.warning("%s keeps an arena of %s: %s", self.agent.name, self.peer or "nobody", error)
