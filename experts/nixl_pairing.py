"""One end of a client and a host that write into each other's memory; both ends are alike."""

import time

from experts.arena import Arena
from experts.bell import Ringer
from experts.lease import NOTE
from experts.nixl_agent import NixlAgent, NixlFailed, OnMessage, SlotWriter

WRITE_OUT_S = 1.0  # for writes under way when it ends
POLL_S = 1e-3


class Pairing:
    """Slots to write from and slots that the peer writes into. Its owner sees to it that one thread at a time uses it.

    Raises NixlFailed when memory cannot be registered.
    """

    def __init__(self, agent: NixlAgent, near: bool, outgoing: Arena, incoming: Arena) -> None:
        self.agent = agent
        self.near = near
        self.outgoing = outgoing
        self.incoming = incoming
        self.peer = ""
        self.writers: tuple[SlotWriter, ...] = ()
        self._ringer: Ringer | None = None
        self._holding = self._unrung = False
        self._registrations = [agent.register(incoming)]
        self._registrations.append(agent.register(outgoing))

    def metadata(self) -> bytes:
        """What the peer needs to write into `incoming`, and nothing else of ours."""
        return self.agent.metadata(self._registrations[0])

    def connect(self, peer: str, metadata: bytes, address: int, bell: str | None, on_note: OnMessage) -> None:
        """Know the peer, whose slots begin at `address`; raises NixlFailed when its metadata lies."""
        try:
            self._ringer = Ringer(bell) if self.near and bell is not None else None
        except ValueError as error:
            raise NixlFailed(str(error)) from error
        self.agent.add_peer(peer, metadata, on_note)
        self.peer = peer
        size = self.outgoing.slot_bytes
        self.writers = tuple(
            self.agent.writer(peer, slot, address + index * size, self._on_sent)
            for index, slot in enumerate(self.outgoing.slots)
        )

    def write(self, slot: int, length: int, correlation: int) -> None:
        """Send what stands in an outgoing slot; raises NixlFailed when the peer is gone, or still being written to."""
        self.writers[slot].post(length, NOTE.pack(slot, length, correlation))

    def hold(self) -> None:
        """What is written from now on need not wake the peer before `flush`."""
        self._holding = True

    def flush(self) -> None:
        """Wake the peer for what was written since `hold`."""
        self._holding = False
        if self._unrung:
            self.ring()

    @property
    def core(self) -> int | None:
        """Where the peer is likely to wake; None when it is not known."""
        return self._ringer.core if self._ringer is not None else None

    def notify(self, note: bytes) -> None:
        """Send a note alone; raises NixlFailed when the peer is gone."""
        self.agent.notify(self.peer, note)
        self.ring()

    def ring(self) -> None:
        """Wake the peer, if it can be."""
        self._unrung = False
        if self._ringer is not None:
            self._ringer.ring()

    def _on_sent(self) -> None:
        if self._holding:
            self._unrung = True
        else:
            self.ring()

    def close(self) -> None:
        """Write no more: the peer's memory is its own when this returns."""
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
