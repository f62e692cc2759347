"""A host's end of its leases: memory for each client's requests, and replies straight into the client's memory."""

import collections
import ctypes
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence

from experts.arena import Arena, check_arena
from experts.bell import Bell
from experts.host import ExpertHost
from experts.host_lease import Arrived, HostLease
from experts.host_loop import MAX_SLEEP_S
from experts.lane import Lane
from experts.lease import NOTE, VERSION, Accept, End, Hello, LeaseRefused, NixlEnd, Offer, SharedEnd
from experts.nixl import NixlMissing, machine_identity
from experts.nixl_agent import NixlAgent, NixlFailed
from experts.nixl_pairing import NixlPairing
from experts.pairing import PairingFailed
from experts.transport_kinds import Ways
from kernels.lane import Asked
from kernels.native import native

MAX_LEASES = 64
MAX_LEASED_BYTES = 16 << 30  # of all clients together; pages that were never written take no memory
CONNECTING_S = 0.5  # after a grant by NIXL, during which both ends must poll for the connection to be made
MOST_NEWS = 64  # that are taken at once
log = logging.getLogger("shoal.experts")


class _Lanes:
    """The leases by shared memory, as native code looks at them."""

    def __init__(self, leases: Sequence[HostLease]) -> None:
        self.leases = [lease for lease in leases if lease.lane is not None]
        lanes = [lease.lane for lease in leases if lease.lane is not None]
        self.addresses = [lane.address for lane in lanes]
        self.array = (ctypes.c_void_p * len(lanes))(*self.addresses)


class LeaseDoor:
    """The Source of a host's loop whose requests come by leases."""

    def __init__(self, host_id: str, generation: int, ways: Ways, machine: str | None = None) -> None:
        self._host_id = host_id
        self._generation = generation
        self._shared = ways.shared
        self._nixl = ways.nixl
        self._machine = machine or machine_identity()
        self._bell = Bell()
        self._agents: dict[bool, NixlAgent] = {}  # for near and far clients, made when the first comes
        self._leases: list[HostLease] = []
        self._lanes = _Lanes(())
        self._news = (Asked * MOST_NEWS)()
        self._lock = threading.Lock()
        self._notes: collections.deque[tuple[HostLease, bytes]] = collections.deque()
        self._connecting_until_s = 0.0

    def become(self, host_id: str, generation: int) -> None:
        """Be the door of this life, where that was not known before; not after the first offer."""
        self._host_id, self._generation = host_id, generation

    def offer(self, hello: Hello) -> tuple[HostLease, Offer]:
        """Memory for a client; raises LeaseRefused when it asks for too much, or no way is left but gRPC."""
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
            pairing, end = self._pairing(hello, near)
            lease = HostLease(pairing, wanted, hello.reply_bytes)
            self._leases.append(lease)
        return lease, Offer(host=self._host_id, generation=self._generation, near=near, end=end)

    def accept(self, lease: HostLease, accept: Accept) -> None:
        """Begin to serve a client; raises LeaseRefused when what it gave is not what it says."""

        def on_note(note: bytes) -> None:
            self._notes.append((lease, note))

        pairing, end = lease.pairing, accept.end
        try:
            if isinstance(pairing, Lane) and isinstance(end, SharedEnd):
                pairing.connect("a client", end.memory, lease.reply_bytes, end.bell, on_note)
            elif isinstance(pairing, NixlPairing) and isinstance(end, NixlEnd):
                pairing.connect(end.agent, end.metadata, end.address, end.bell, on_note)
                self._connecting_until_s = time.monotonic() + CONNECTING_S
            else:
                raise LeaseRefused(f"another way than {end.way} was offered")
        except PairingFailed as error:
            raise LeaseRefused(str(error)) from error
        lease.connected = True
        self._look_at_lanes()
        self._bell.ring()

    def end(self, lease: HostLease) -> None:
        """A client is gone, or has done: forget it and free its memory."""
        lease.end()
        with self._lock:
            self._leases.remove(lease)
        self._look_at_lanes()

    @property
    def leases(self) -> int:
        return len(self._leases)

    def answer_alone(self, host: ExpertHost) -> bool:
        """Answer one request where it lies, if one is all there is; False: see what `poll` has."""
        lanes = self._lanes
        if not lanes.leases or (self._agents and self._look_at_agents()):
            return False
        found = self._news_of(lanes)
        if not found:
            return False
        asked = self._news[0]
        lane = asked.lane
        alone = found == 1 and asked.whole and not self._notes and not lanes.leases[lane].ended
        if alone and host.answer_in_place(lanes.addresses[lane], asked):
            return True
        self._note(lanes, found)
        return False

    def poll(self) -> Sequence[Arrived]:
        if not self._look():
            return ()
        if len(self._notes) == 1:
            lease, note = self._notes.popleft()
            job = lease.job(note)
            return () if job is None else (job,)
        arrived: dict[tuple[int, int], Arrived] = {}
        while self._notes:
            lease, note = self._notes.popleft()
            job = lease.job(note)
            if job is not None:
                # a second note for a slot that was not answered yet breaks the rules: the first stands
                arrived.setdefault((id(lease), job.slot), job)
        return tuple(arrived.values())

    @property
    def rings(self) -> int:
        return self._bell.rings

    def wait(self, rings: int, idle_s: float, look_s: float, look: Callable[[], bool]) -> bool:
        lanes = self._lanes
        if not self._agents:  # everybody rings, and native code hears it
            library = native()
            if library is not None:
                look_ns, sleep_ns = int(max(0.0, look_s - idle_s) * 1e9), int(MAX_SLEEP_S * 1e9)
                page = self._bell.page
                return bool(library.shoal_wait_news(lanes.array, len(lanes.leases), page, rings, look_ns, sleep_ns))
        if idle_s <= look_s:
            return False
        pause_s = self._pause_s(idle_s)
        if pause_s < 1e-3:
            time.sleep(pause_s)
        else:
            self._bell.wait(pause_s, lambda: self._look() or look())
        return True

    def _pause_s(self, idle_s: float) -> float:
        """How long to sleep when nothing has come for `idle_s` seconds, as NIXL's notes ring no bell."""
        if time.monotonic() < self._connecting_until_s:
            return 1e-3
        leases = tuple(self._leases)
        if not leases:
            return MAX_SLEEP_S
        if all(lease.pairing.near for lease in leases):
            return 5e-3 if idle_s < 1.0 else 50e-3  # the bell wakes; this is for a note that was still on its way
        if idle_s < 1e-3:
            return 20e-6
        if idle_s < 0.1:
            return 100e-6
        return 1e-3 if idle_s < 1.0 else 20e-3  # a look, which asks every connection, takes a tenth of a millisecond

    def ring(self) -> None:
        self._bell.ring()

    def close(self) -> None:
        """After the loop and the streams have ended."""
        self._bell.close()

    def _look(self) -> bool:
        self._look_at_agents()
        lanes = self._lanes
        if lanes.leases:
            self._note(lanes, self._news_of(lanes))
        return bool(self._notes)

    def _news_of(self, lanes: _Lanes) -> int:
        library = native()
        assert library is not None
        found: int = library.shoal_news(lanes.array, len(lanes.leases), self._news, MOST_NEWS)
        return found

    def _note(self, lanes: _Lanes, found: int) -> None:
        """Keep what is among the news for `poll`."""
        for asked in self._news[:found]:
            if 0 <= asked.length < 1 << 32:
                self._notes.append((lanes.leases[asked.lane], NOTE.pack(asked.slot, asked.length, asked.correlation)))

    def _look_at_agents(self) -> bool:
        for agent in tuple(self._agents.values()):
            try:
                agent.poll()
            except NixlFailed as error:
                log.warning("%s: %s", self._host_id, error)  # one peer's trouble, and its lease will end
        return bool(self._notes)

    def _look_at_lanes(self) -> None:
        """From now on at those of the leases that there are."""
        with self._lock:
            self._lanes = _Lanes([lease for lease in self._leases if lease.connected])

    def _pairing(self, hello: Hello, near: bool) -> tuple[Lane | NixlPairing, End]:
        bell = self._bell.address
        if near and hello.shared and self._shared:
            lane = Lane(hello.request_bytes, hello.slots)
            return lane, SharedEnd(memory=lane.memory, bell=bell)
        if not (hello.nixl and self._nixl):
            raise LeaseRefused("no way but gRPC is left between these two")
        try:
            agent = self._agent(near)
        except NixlMissing as error:
            raise LeaseRefused(str(error)) from error
        outgoing, incoming = Arena(hello.reply_bytes, hello.slots), Arena(hello.request_bytes, hello.slots)
        pairing = NixlPairing(agent, near, outgoing, incoming)
        end = NixlEnd(
            agent=agent.name, metadata=pairing.metadata, bell=bell if near else None, address=incoming.address
        )
        return pairing, end

    def _agent(self, near: bool) -> NixlAgent:
        if near not in self._agents:
            name = f"{self._host_id}-{self._generation}-{secrets.token_hex(8)}"
            self._agents = {**self._agents, near: NixlAgent(name, near)}
        return self._agents[near]
