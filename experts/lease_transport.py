"""Hosts by shared memory or NIXL where they can be paired with, else by gRPC: each host and each call for itself."""

import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from experts.bell import Bell, current_core
from experts.client_lease import ClientLease
from experts.flight import Lanes
from experts.grpc_transport import GrpcTransport
from experts.lease_settings import LeaseSettings
from experts.messages import ForwardRequest
from experts.nixl import machine_identity
from experts.nixl_agent import NixlAgent
from experts.tls import TlsFiles
from experts.transport import Pending
from experts.transport_kinds import Way, Ways
from router.placement import Host

RETRY_S = 5.0  # after a lease was lost, and the host was not forgotten since; twice as long after each refusal
MAX_RETRY_S = 300.0
MOST_REFUSED = 16  # that are counted
CLOSE_S = 1.0


class LeaseTransport:
    """Hosts of this machine by memory that both map, others by NIXL, where it is installed on both sides.

    A lease is made in the background, so no call waits for one: until it is there, and for frames that fit no slot,
    and when all slots are in use, calls go by gRPC.
    """

    def __init__(
        self,
        token: str | None,
        tls: TlsFiles | None,
        request_bytes: int,
        reply_bytes: int,
        ways: Ways,
        machine: str | None = None,
    ) -> None:
        """Slots of `request_bytes` and `reply_bytes` (see `arena.slot_bytes`); `machine` is for tests."""
        self._agents: dict[bool, NixlAgent] = {}  # for near hosts, and far ones
        self._bell = Bell()
        self._settings = LeaseSettings(
            token=token,
            tls=tls,
            machine=machine or machine_identity(),
            request_bytes=request_bytes,
            reply_bytes=reply_bytes,
            shared=ways.shared,
            nixl=ways.nixl,
            agent=self._agent_for,
            bell=self._bell,
            crowded=self._crowded,
        )
        self._cores = len(os.sched_getaffinity(0))
        self._held: dict[ClientLease, None] = {}  # whose hosts were not woken yet
        self._lanes: Lanes | None = None
        self._refused: dict[Host, int] = {}  # leases of each host, one after another
        self._asked: tuple[ClientLease, ...] = ()  # near ones whose hosts were woken last
        self._grpc = GrpcTransport(token, tls)
        self._making = threading.Lock()  # around an agent's making, for which nobody else waits
        self._lock = threading.Lock()
        self._leases: dict[Host, ClientLease] = {}
        self._leaving: dict[Host, threading.Thread] = {}  # of leases closed here, and not yet by the host

    def submit(self, host: Host, request: ForwardRequest) -> Pending:
        """Send without waiting; raises FrameError when the request is over a frame's caps."""
        lease = self._leases.get(host)
        if lease is not None and lease.ready:
            call = lease.start(request)
            if call is not None:
                self._held[lease] = None
                return call
        else:
            self._pair(host, lease)
        return self._grpc.submit(host, request)

    def lanes(self, hosts: Sequence[Host]) -> Lanes | None:
        """The ways to all of these hosts where each is reached by shared memory just now; else None."""
        known = self._lanes
        if known is not None and known.hosts is hosts and known.ready:
            return known
        leases = [self._leases.get(host) for host in hosts]
        for host, lease in zip(hosts, leases, strict=True):
            if lease is None or not lease.ready:
                self._pair(host, lease)
        able = [lease for lease in leases if lease is not None and lease.ready and lease.lane is not None]
        self._lanes = Lanes(hosts, able, self._bell, self._cores) if len(able) == len(hosts) else None
        return self._lanes

    def flush(self) -> None:
        """Wake the hosts that were written to: the one whose core this is last, since it may take it at once."""
        held, self._held = tuple(self._held), {}
        if len(held) > 1:
            here = current_core()
            held = tuple(sorted(held, key=lambda lease: lease.core == here))
        for lease in held:
            lease.flush()
        self._asked = tuple(lease for lease in held if lease.near)

    def wait_ready(self, host: Host, timeout_s: float) -> bool:
        """Pair with a host now; False when calls to it will go by gRPC after all."""
        deadline_s = time.monotonic() + timeout_s
        lease = self._leases.get(host) or self._open(host)
        while lease is not None and not lease.ready:
            if lease.over or time.monotonic() >= deadline_s:
                return False
            time.sleep(0.001)
        return lease is not None

    def ways(self) -> dict[Host, Way]:
        """By which way rows go just now to each host that was asked; any thread may ask."""
        # a copy that no thread comes between, and without the lock
        leases = self._leases.copy()
        return self._grpc.ways() | {host: lease.way for host, lease in leases.items()}

    def forget(self, host: Host) -> None:
        with self._lock:
            lease = self._leases.pop(host, None)
            if lease is not None:
                self._held.pop(lease, None)
                self._asked = ()
                self._lanes = None
                self._refused.pop(host, None)
                lease.close()
                self._leaving[host] = lease.thread
        self._grpc.forget(host)

    def close(self) -> None:
        with self._lock:
            leases, self._leases = tuple(self._leases.values()), {}
            self._lanes = None
            for lease in leases:
                lease.close()
            threads = [*self._leaving.values(), *(lease.thread for lease in leases)]
        self._grpc.close()
        deadline_s = time.monotonic() + CLOSE_S
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        if not any(thread.is_alive() for thread in threads):
            self._bell.close()  # else a frozen host holds its lease, whose thread will ring once more

    def _crowded(self) -> bool:
        return len(self._asked) >= self._cores and sum(lease.busy for lease in self._asked) >= self._cores

    def _pair(self, host: Host, lease: ClientLease | None) -> None:
        """Begin to, where there is no lease and it is time to ask for one."""
        if lease is None or (lease.over and time.monotonic() > lease.over_since_s + self._retry_s(host)):
            self._open(host)

    def _retry_s(self, host: Host) -> float:
        return float(min(RETRY_S * 2 ** self._refused.get(host, 0), MAX_RETRY_S))

    def _open(self, host: Host) -> ClientLease | None:
        with self._lock:
            lease = self._leases.get(host)
            if lease is not None and not lease.over:
                return lease
            self._leaving = {each: left for each, left in self._leaving.items() if left.is_alive()}
            if host in self._leaving:  # its agent knows ours under this name still
                return None
            if lease is not None and not lease.ended:
                return None
            settings = self._settings
            if lease is not None:
                self._refused[host] = 0 if lease.was_ready else min(self._refused.get(host, 0) + 1, MOST_REFUSED)
                if lease.unshareable:
                    settings = replace(settings, shared=False)
            lease = self._leases[host] = ClientLease(host, settings)
            lease.unshareable = settings.shared != self._settings.shared
            return lease

    def _agent_for(self, near: bool) -> NixlAgent:
        with self._making:
            if near not in self._agents:
                self._agents[near] = NixlAgent(f"client-{secrets.token_hex(8)}", near)
            return self._agents[near]
