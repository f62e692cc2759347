"""A host's end of NIXL: an arena for each client's requests, and the replies written straight back to the client."""

import collections
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from experts.arena import Arena, check_arena
from experts.arena_frames import get_request, put_refusal, put_reply, reply_view
from experts.bell import Bell
from experts.errors import FrameError, HostRefused
from experts.host_loop import MAX_SLEEP_S, Answer
from experts.lease import NOTE, PING, VERSION, Accept, Hello, LeaseRefused, Offer
from experts.messages import ForwardRequest
from experts.nixl import machine_identity
from experts.nixl_agent import NixlAgent, NixlFailed
from experts.nixl_pairing import Pairing

MAX_LEASES = 64
MAX_LEASED_BYTES = 16 << 30  # of all clients together; pages that were never written take no memory
CONNECTING_S = 0.5  # after a grant, during which both ends must poll for the connection to be made
log = logging.getLogger("shoal.experts")


class HostLease:
    """One client's pairing. Ended by its stream, used by the loop."""

    def __init__(self, pairing: Pairing) -> None:
        self.pairing = pairing
        self.nbytes = pairing.incoming.nbytes + pairing.outgoing.nbytes
        self._lock = threading.Lock()  # between the loop, which writes, and the stream, which ends it
        self.ended = False

    def send(self, slot: int, length: int, correlation: int) -> None:
        """Write what stands in a reply slot to the client, unless it is gone."""
        with self._lock:
            if not self.ended:
                try:
                    self.pairing.write(slot, length, correlation)
                except NixlFailed as error:  # its stream is about to say so too
                    log.debug("a reply to %s was not sent: %s", self.pairing.peer, error)

    def send_back(self, note: bytes) -> None:
        """Answer a ping."""
        with self._lock:
            if not self.ended:
                try:
                    self.pairing.notify(note)
                except NixlFailed as error:
                    log.debug("%s cannot be reached: %s", self.pairing.peer, error)

    def busy(self, slot: int) -> bool:
        """Whether the last reply of a slot is under way still."""
        return self.ended or self.pairing.writers[slot].busy

    def end(self) -> None:
        """Write no more to the client, whose memory is its own again when this returns."""
        with self._lock:
            self.ended = True
            self.pairing.close()


@dataclass(frozen=True, slots=True)
class _Arrived:
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


class NixlDoor:
    """The Source of a host's loop whose requests come by NIXL; raises NixlMissing when it is not installed."""

    def __init__(self, host_id: str, generation: int, machine: str | None = None) -> None:
        self._host_id = host_id
        self._generation = generation
        self._machine = machine or machine_identity()
        self._bell = Bell()
        self._agents = {True: self._agent(near=True)}  # the far one is made when the first far client comes
        self._leases: list[HostLease] = []
        self._lock = threading.Lock()
        self._notes: collections.deque[tuple[HostLease, bytes]] = collections.deque()
        self._connecting_until_s = 0.0

    def become(self, host_id: str, generation: int) -> None:
        """Be the door of this life, where that was not known before; not after the first offer."""
        self._host_id, self._generation = host_id, generation

    def offer(self, hello: Hello) -> tuple[HostLease, Offer]:
        """Memory for a client; raises LeaseRefused when it asks for too much."""
        if hello.version != VERSION:
            raise LeaseRefused(f"the client's lease version is {hello.version}; this host speaks {VERSION}")
        try:
            check_arena(hello.request_bytes, hello.slots)
            check_arena(hello.reply_bytes, hello.slots)
        except ValueError as error:
            raise LeaseRefused(str(error)) from error
        near = hello.machine == self._machine
        with self._lock:
            leased = sum(lease.nbytes for lease in self._leases)
            wanted = hello.slots * (hello.request_bytes + hello.reply_bytes)
            if len(self._leases) >= MAX_LEASES or leased + wanted > MAX_LEASED_BYTES:
                raise LeaseRefused(
                    f"{self._host_id} has {len(self._leases)} leases of {leased} bytes and {wanted} more are wanted; "
                    f"its caps are {MAX_LEASES} leases and {MAX_LEASED_BYTES} bytes"
                )
            if near not in self._agents:
                self._agents[near] = self._agent(near)
            agent = self._agents[near]
            outgoing, incoming = Arena(hello.reply_bytes, hello.slots), Arena(hello.request_bytes, hello.slots)
            lease = HostLease(Pairing(agent, near, outgoing, incoming))
            self._leases.append(lease)
        return lease, Offer(
            agent=agent.name,
            metadata=lease.pairing.metadata(),
            bell=self._bell.address if near else None,
            address=incoming.address,
            host=self._host_id,
            generation=self._generation,
            near=near,
        )

    def accept(self, lease: HostLease, accept: Accept) -> None:
        """Begin to serve a client; raises LeaseRefused when its metadata is not what it says."""

        def on_note(note: bytes) -> None:
            self._notes.append((lease, note))

        try:
            lease.pairing.connect(accept.agent, accept.metadata, accept.address, accept.bell, on_note)
        except NixlFailed as error:
            raise LeaseRefused(str(error)) from error
        self._connecting_until_s = time.monotonic() + CONNECTING_S
        self._bell.ring()

    def end(self, lease: HostLease) -> None:
        """A client is gone, or has done: forget it and free its memory."""
        lease.end()
        with self._lock:
            self._leases.remove(lease)

    @property
    def leases(self) -> int:
        return len(self._leases)

    def poll(self) -> Sequence[_Arrived]:
        if not self._look():
            return ()
        if len(self._notes) == 1:
            job = self._job(*self._notes.popleft())
            return () if job is None else (job,)
        arrived: dict[tuple[int, int], _Arrived] = {}
        while self._notes:
            lease, note = self._notes.popleft()
            job = self._job(lease, note)
            if job is not None:
                # a second note for a slot that was not answered yet breaks the rules: the first stands
                arrived.setdefault((id(lease), job.slot), job)
        return tuple(arrived.values())

    def pause_s(self, idle_s: float) -> float:
        if time.monotonic() < self._connecting_until_s:
            return 1e-3
        leases = tuple(self._leases)
        if not leases:
            return MAX_SLEEP_S
        if all(lease.pairing.near for lease in leases):  # the bell wakes; this is for a note that was still on its way
            return 5e-3 if idle_s < 1.0 else 50e-3
        if idle_s < 1e-3:
            return 20e-6
        return 100e-6 if idle_s < 0.1 else 1e-3 if idle_s < 1.0 else 5e-3

    def wait(self, timeout_s: float, look: Callable[[], bool]) -> None:
        if timeout_s < 1e-3:
            time.sleep(timeout_s)
        else:
            self._bell.wait(timeout_s, lambda: self._look() or look())

    def ring(self) -> None:
        self._bell.ring()

    def close(self) -> None:
        """After the loop and the streams have ended."""
        self._bell.close()

    def _look(self) -> bool:
        for agent in tuple(self._agents.values()):
            try:
                agent.poll()
            except NixlFailed as error:
                log.warning("%s: %s", self._host_id, error)  # one peer's trouble, and its lease will end
        return bool(self._notes)

    def _agent(self, near: bool) -> NixlAgent:
        return NixlAgent(f"{self._host_id}-{self._generation}-{secrets.token_hex(8)}", near)

    def _job(self, lease: HostLease, note: bytes) -> _Arrived | None:
        if lease.ended or len(note) != NOTE.size:
            return None
        slot, length, correlation = NOTE.unpack(note)
        if slot == PING:
            lease.send_back(note)
            return None
        if slot >= len(lease.pairing.writers) or lease.busy(slot):
            log.debug("%s announced slot %d, which it may not use now", lease.pairing.peer, slot)
            return None  # there is no place to refuse it in
        try:
            request = get_request(lease.pairing.incoming.slots[slot], length, correlation)
            pairs, hidden = request.pair_row_P.shape[0], request.x_RD.shape[1]
            out = reply_view(lease.pairing.outgoing.slots[slot], pairs, hidden)
            if out is None:
                raise FrameError(
                    f"{pairs} rows of {hidden} do not fit the {lease.pairing.outgoing.slot_bytes} bytes of a reply"
                )
        except FrameError as error:
            refusal = HostRefused("bad_request", str(error))
            lease.send(slot, put_refusal(lease.pairing.outgoing.slots[slot], refusal, correlation), correlation)
            return None
        return _Arrived(lease, slot, correlation, request, out)
