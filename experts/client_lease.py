"""A client's pairing with one host life for direct writes: its thread has it opened, keeps it, and tidies up."""

import logging
import queue
import threading
import time

import grpc

from experts.arena import SLOTS
from experts.arena_frames import get_reply, put_request
from experts.arrival import Arrival
from experts.client_slots import SlotTable
from experts.errors import ExpertError, FrameError, HostSlow, HostUnavailable
from experts.frames import HEADER
from experts.grpc_stream import call_metadata, describe, open_channel
from experts.lane import Lane
from experts.lease import METHOD, LeaseRefused
from experts.lease_call import LeaseCall
from experts.lease_opening import LeaseOpening
from experts.lease_settings import LeaseSettings
from experts.messages import ForwardReply, ForwardRequest
from experts.nixl import NixlMissing
from experts.pairing import Pairing, PairingFailed
from experts.transport_kinds import Way
from experts.wire import identity
from router.placement import Host

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
        self._arrival = Arrival(host, settings.bell, settings.crowded)
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
        # it refers to this lease, so nothing that outlives the thread may refer to it
        opening = LeaseOpening(self._host, self._settings, self._outbox.put, self.slots.answer, lambda: self._closing)
        try:
            self.pairing = opening.run(self._messages)
            self.lane = opening.lane
            with self._lock:
                self.ready = self.was_ready = not self._closing
            for _ in self._messages:
                continue  # nothing is expected; the end is what it is for
        except grpc.RpcError as error:
            reason = describe(error)
            error.with_traceback(None)  # it is the stream itself, and would keep this frame, and so the memory
        except (LeaseRefused, PairingFailed, NixlMissing) as error:
            reason = str(error)
            self.unshareable = opening.unshareable
            self._messages.cancel()  # no call was made yet, so the host writes nothing
        finally:
            self._end(reason, opening)

    def _end(self, reason: str, opening: LeaseOpening) -> None:
        """The host is gone or has done, so nobody writes to our memory: it may go."""
        with self._lock:
            self.ready = False
            self._closing = True
            self.over_since_s = time.monotonic()
            self.reason = reason
        if opening.lane is not None:
            opening.lane.end()
        self._settings.bell.ring()
        opening.close()
        self._outbox.put(None)
        self._channel.close()
