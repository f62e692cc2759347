"""One client's lease at a host, and the requests that came by it."""

import logging
import threading
from dataclasses import dataclass

from torch import Tensor

from experts.arena_frames import get_request, put_refusal, put_reply, reply_view
from experts.errors import FrameError, HostRefused
from experts.host_loop import Answer
from experts.lane import Lane
from experts.lease import NOTE, PING
from experts.messages import ForwardRequest
from experts.nixl_pairing import NixlPairing
from experts.pairing import Pairing, PairingFailed

log = logging.getLogger("shoal.experts")


class HostLease:
    """One client's pairing. Ended by its stream, used by the loop."""

    def __init__(self, pairing: Pairing, nbytes: int, reply_bytes: int) -> None:
        self.pairing = pairing
        self.nbytes = nbytes
        self.reply_bytes = reply_bytes  # of a slot
        self.connected = False
        self._lock = threading.Lock()  # between the loop, which writes, and the stream, which ends it
        self.ended = False

    @property
    def lane(self) -> Lane | None:
        """The pairing, where memory is shared."""
        return self.pairing if isinstance(self.pairing, Lane) else None

    def send(self, slot: int, length: int, correlation: int) -> None:
        """Write what stands in a reply slot to the client, unless it is gone."""
        with self._lock:
            if not self.ended:
                try:
                    self.pairing.write(slot, length, correlation)
                except PairingFailed as error:  # its stream is about to say so too
                    log.debug("a reply to %s was not sent: %s", self.pairing.peer, error)

    def send_back(self, note: bytes) -> None:
        """Answer a ping."""
        with self._lock:
            if not self.ended and isinstance(self.pairing, NixlPairing):
                try:
                    self.pairing.notify(note)
                except PairingFailed as error:
                    log.debug("%s cannot be reached: %s", self.pairing.peer, error)

    def job(self, note: bytes) -> "Arrived | None":
        """What a note of the client announces; None where that is nothing to compute, or was answered already."""
        if self.ended or len(note) != NOTE.size:
            return None
        slot, length, correlation = NOTE.unpack(note)
        if slot == PING:
            self.send_back(note)
            return None
        outgoing = self.pairing.outgoing
        if slot >= len(outgoing.slots) or self.pairing.busy(slot):
            log.debug("%s announced slot %d, which it may not use now", self.pairing.peer, slot)
            return None  # there is no place to refuse it in
        try:
            request = get_request(self.pairing.incoming.slots[slot], length, correlation)
            pairs, hidden = request.pair_row_P.shape[0], request.x_RD.shape[1]
            out = reply_view(outgoing.slots[slot], pairs, hidden)
            if out is None:
                raise FrameError(f"{pairs} rows of {hidden} do not fit the {outgoing.slot_bytes} bytes of a reply")
        except FrameError as error:
            refusal = HostRefused("bad_request", str(error))
            self.send(slot, put_refusal(outgoing.slots[slot], refusal, correlation), correlation)
            return None
        return Arrived(self, slot, correlation, request, out)

    def end(self) -> None:
        """Write no more to the client, whose memory is its own again when this returns.

        To a lane a reply that is being computed is written all the same: its memory is not used again.
        """
        with self._lock:
            self.ended = True
        self.pairing.close()  # which may take a while, and the loop, which has others to answer, waits for the lock


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request in its slot, and the place for its reply; a Job of the loop."""

    lease: HostLease
    slot: int
    correlation: int
    request: ForwardRequest
    out: Tensor

    def settle(self, answer: Answer) -> None:
        reply = self.lease.pairing.outgoing.slots[self.slot]
        if isinstance(answer, HostRefused):
            length = put_refusal(reply, answer, self.correlation)
        else:
            pairs, hidden = answer.y_PD.shape
            length = put_reply(reply, answer.generation, pairs, hidden, self.correlation)
        self.lease.send(self.slot, length, self.correlation)
