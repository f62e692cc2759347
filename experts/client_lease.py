"""A client's pairing with one host life for direct writes. Its thread opens it, keeps it, and cleans up after it."""

import logging
import queue
import threading
import time
from collections.abc import Callable

import grpc

from experts.arena import SLOTS, Arena
from experts.arena_frames import get_reply, put_request
from experts.arrival import Arrival
from experts.client_slots import SlotTable
from experts.errors import ExpertError, FrameError, HostSlow, HostUnavailable
from experts.frames import HEADER
from experts.grpc_stream import call_metadata, describe, open_channel
from experts.lane import Lane
from experts.lease import (
    METHOD,
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
from experts.lease_call import LeaseCall
from experts.lease_settings import LeaseSettings
from experts.messages import ForwardReply, ForwardRequest
from experts.nixl import NixlMissing
from experts.nixl_pairing import NixlPairing
from experts.pairing import Pairing, PairingFailed
from experts.transport_kinds import Way
from experts.wire import identity
from router.placement import Host

CONNECT_S = 5.0
CONNECT_POLL_S = 200e-6
log = logging.getLogger("shoal.experts")


class ClientLease:
    """Opened in the background: until `ready`, and again when it is over, calls must go another way."""

    pairing: Pairing  # while `ready`, and after

    def __init__(self, host: Host, settings: LeaseSettings) -> None:
        self._host = host
        self._settings = settings
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # around writing: nothing is written once `_closing`
        self._closing = False
        self._pinged = False
        self._arrival = Arrival(host, settings.bell, settings.crowded)
        self._cleanup: Callable[[], None] | None = None
        self.lane: Lane | None = None  # while `ready`, where memory is shared
        self.slots = SlotTable(SLOTS)
        self.ready = False
        self.was_ready = False
        self.unshareable = False  # whether the host's memory cannot be mapped here
        self.reason: str | None = None  # why it is over
        self.over_since_s = 0.0
        self._channel = open_channel(host, settings.tls)
        call = self._channel.stream_stream(METHOD, identity, identity)
        self._messages = call(iter(self._outbox.get, None), metadata=call_metadata(settings.token))
        # whoever waits for the end of a lease keeps its thread, and not the lease, whose memory is then free
        self.thread = threading.Thread(target=self._run, name=f"lease-{host.id}", daemon=True)
        self.thread.start()

    @property
    def over(self) -> bool:
        return self.reason is not None

    @property
    def way(self) -> Way:
        """That calls take just now, as long as a slot is free and they fit it; any thread may ask."""
        if not self.ready:
            return "grpc"
        return "nixl" if self.lane is None else "shared"

    @property
    def ended(self) -> bool:
        """Whether it is over and cleaned up after."""
        return not self.thread.is_alive()

    def start(self, request: ForwardRequest) -> LeaseCall | None:
        """Send a request; None when this way cannot take it. Raises FrameError when it is over a frame's caps."""
        reply_numbers = request.pair_row_P.shape[0] * request.x_RD.shape[1]
        if HEADER.size + 4 * reply_numbers > self._settings.reply_bytes:
            return None
        with self._lock:
            taken = self.take() if self.ready and not self._closing else None
            if taken is None:
                return None
            slot, correlation = taken
            try:
                length = put_request(self.pairing.outgoing.slots[slot], request, correlation)
            except FrameError:
                self.slots.release(slot)
                raise
            if length is None:
                self.slots.release(slot)
                return None
            self.pairing.hold()
            try:
                self.pairing.write(slot, length, correlation)
            except PairingFailed as error:  # how much was written is not known, so the slot stays taken
                self.ready = False
                self._outbox.put(None)  # the host ends the stream, and the next lease may do better
                log.debug("%s cannot be written to: %s", self._host.id, error)
                return None
        return LeaseCall(self, slot, correlation)

    def take(self) -> tuple[int, int] | None:
        """A free slot and the id of its call, or None."""
        if self.slots.late:  # its reply may have come, or another thread's
            try:
                if self.pairing.poll():
                    self._settings.bell.ring_others()
            except PairingFailed as error:  # the lease is about to say so
                log.debug("%s: %s", self._host.id, error)
                return None
        return self.slots.take()

    def flush(self) -> None:
        """Wake the host for what was sent, unless it is over."""
        with self._lock:
            if not self._closing:
                self.pairing.flush()

    @property
    def core(self) -> int | None:
        """Where a near host is likely to wake."""
        with self._lock:
            return self.pairing.core if self.ready else None

    @property
    def near(self) -> bool:
        """Whether the host is on this machine; to be asked of one that was `ready`."""
        return self.pairing.near

    @property
    def busy(self) -> bool:
        """Whether the host may be computing for this client."""
        return self.ready and self.slots.taken > 0

    def wait(self, slot: int, correlation: int, timeout_s: float) -> ForwardReply:
        """See `Pending.result`; also raises FrameError when the reply lies about itself."""
        deadline_s = time.monotonic() + timeout_s
        self.flush()
        try:
            length = self._arrival.wait(self.pairing, self.slots, slot, deadline_s, lambda: self.reason)
        except HostSlow:
            raise  # the slot waits on
        except HostUnavailable:
            self.slots.abandon(slot)
            raise
        try:
            return get_reply(self.pairing.incoming.slots[slot], length, correlation)
        except ExpertError:
            self.slots.release(slot)
            raise

    def close(self) -> None:
        """Write no more, and tell the host so. The memory it may write into lives until the host ends the stream."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            granted = self.ready
        if granted:
            self._outbox.put(None)
        else:
            self._messages.cancel()

    def join(self, timeout_s: float) -> bool:
        """Wait for the host's word that the pairing is over; False when it did not come."""
        self.thread.join(timeout_s)
        return self.ended

    def _run(self) -> None:
        reason = "the host ended the lease"
        try:
            self._open()
            for _ in self._messages:
                continue  # nothing is expected; the end is what it is for
        except grpc.RpcError as error:
            reason = describe(error)
            error.with_traceback(None)  # it is the stream itself, and would keep this frame, and so the memory
        except (LeaseRefused, PairingFailed, NixlMissing) as error:
            reason = str(error)
            self._messages.cancel()  # no call was made yet, so the host writes nothing
        finally:
            self._end(reason)

    def _open(self) -> None:
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
        self._outbox.put(encode_message(hello))
        offer = self._receive(Offer)
        if (offer.host, offer.generation) != (self._host.id, self._host.generation):
            raise LeaseRefused(f"{offer.host} of generation {offer.generation} answers at {self._host.address}")
        if isinstance(offer.end, SharedEnd):
            self._share(offer.end)
        else:
            self._pair(offer.end, offer.near)
        with self._lock:
            self.ready = self.was_ready = not self._closing

    def _share(self, end: SharedEnd) -> None:
        lane = Lane(self._settings.reply_bytes, SLOTS)
        self._cleanup = lane.close
        self.pairing = self.lane = lane
        try:
            lane.connect(self._host.id, end.memory, self._settings.request_bytes, end.bell, self._on_note)
        except PairingFailed:
            self.unshareable = True
            raise
        accept = Accept(end=SharedEnd(memory=lane.memory, bell=self._settings.bell.address))
        self._outbox.put(encode_message(accept))
        self._receive(Granted)

    def _pair(self, end: NixlEnd, near: bool) -> None:
        settings = self._settings
        outgoing, incoming = Arena(settings.request_bytes, SLOTS), Arena(settings.reply_bytes, SLOTS)
        pairing = NixlPairing(settings.agent(near), near, outgoing, incoming)
        self._cleanup = pairing.close
        self.pairing = pairing
        pairing.connect(end.agent, end.metadata, end.address, end.bell, self._on_note)
        accept = NixlEnd(
            agent=pairing.agent.name,
            metadata=pairing.metadata,
            bell=settings.bell.address if near else None,
            address=incoming.address,
        )
        self._outbox.put(encode_message(Accept(end=accept)))
        self._receive(Granted)
        self._ping(pairing)

    def _receive(self, kind: type[Message]) -> Message:
        message = next(self._messages, None)
        if message is None:
            raise LeaseRefused("the host ended the lease while it was made")
        return decode_message(kind, message)

    def _ping(self, pairing: NixlPairing) -> None:
        """One note there and back: the first takes a connection's making, and no call should wait for that."""
        pairing.notify(NOTE.pack(PING, 0, 0))
        deadline_s = time.monotonic() + CONNECT_S
        while not self._pinged:
            if time.monotonic() > deadline_s or self._closing:
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
            self.slots.answer(slot, length, correlation)

    def _end(self, reason: str) -> None:
        """The host is gone or has done, so nobody writes to our memory: it may go."""
        with self._lock:
            self.ready = False
            self._closing = True
            self.over_since_s = time.monotonic()
            self.reason = reason
        if self.lane is not None:
            self.lane.end()
        self._settings.bell.ring()
        if self._cleanup is not None:
            self._cleanup()
        self._outbox.put(None)
        self._channel.close()
