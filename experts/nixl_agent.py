"""The one NIXL agent of a transport or a host: registered arenas, peers, one-sided writes, notifications.

NIXL is optional. Its agents are not thread-safe, so every call into one is made under its lock; it has no progress
thread, which on few cores adds milliseconds, so messages move when `poll` is called.
"""

import threading
from collections.abc import Callable
from typing import Any

from experts.arena import PAGE_BYTES, Arena, Slot
from experts.nixl import need_nixl
from experts.pairing import PairingFailed

KEPT_BYTES = 1 << 20  # transfers up to this size are kept, to be posted again
OnMessage = Callable[[bytes], None]


class NixlFailed(PairingFailed):
    """NIXL refused an operation; a peer that is gone is the usual reason."""


class NixlAgent:
    """Raises NixlMissing when NIXL is not installed. `near` serves peers on this machine, and no others.

    Between processes of one machine UCX sends notifications through shared memory only when it need not report dead
    peers itself; else by TCP, at twice the latency. The lease stream tells us of dead peers, so near agents do without.
    """

    def __init__(self, name: str, near: bool) -> None:
        self._nixl = need_nixl()
        errors = [getattr(self._nixl, each) for each in dir(self._nixl) if each.startswith("nixl")]
        self._errors = tuple(each for each in errors if isinstance(each, type) and issubclass(each, Exception))
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = False
        config.useListenThread = False
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_NONE
        self.name = name
        self.lock = threading.Lock()
        self._agent = self._nixl.nixlAgent(name, config)
        mode = "none" if near else "peer"
        self._backend = self._agent.createBackend("UCX", {"ucx_error_handling_mode": mode})
        self._peers: dict[str, OnMessage] = {}
        self._moving: set[SlotWriter] = set()  # their notes are sent only by looking whether they have ended

    def register(self, arena: Arena) -> Any:
        """Let NIXL read and write an arena until `deregister`."""
        descriptors = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(arena.address, arena.nbytes, 0, "")])
        with self.lock:
            self._try(self._agent.registerMem, descriptors, [self._backend])
        return descriptors

    def deregister(self, registration: Any) -> None:
        with self.lock:
            self._try(self._agent.deregisterMem, registration, [self._backend])

    def metadata(self, registration: Any) -> bytes:
        """What a peer needs to reach this agent and one arena, and no others."""
        with self.lock:
            found: bytes = self._try(self._agent.getLocalPartialMD, registration, True, [self._backend])
        return found

    def add_peer(self, name: str, metadata: bytes, on_message: OnMessage) -> None:
        """Know a peer; `on_message` gets its notifications, inside `poll`. Raises NixlFailed on metadata that lies."""
        with self.lock:
            if name in self._peers:
                raise NixlFailed(f"{name} is leased already: end that lease first")
            found = self._try(self._agent.loadRemoteMD, metadata)
            found = found.decode(errors="replace") if isinstance(found, bytes) else found
            if found != name:
                if found not in self._peers:
                    self._try(self._agent.invalidateRemoteMD, found)
                raise NixlFailed(f"the metadata is of {found!r}; expected {name!r}")
            self._peers[name] = on_message

    def remove_peer(self, name: str) -> None:
        """Forget a peer; what it still sends is dropped."""
        with self.lock:
            if self._peers.pop(name, None) is not None:
                try:
                    self._agent.invalidateRemoteMD(name)
                except self._errors:
                    return  # it had disconnected, which forgets it too

    def notify(self, name: str, note: bytes) -> None:
        """Send a note without a write; raises NixlFailed when the peer is gone."""
        with self.lock:
            self._try(self._agent.genNotif, name, note, [self._backend])

    def poll(self) -> int:
        """Move messages, and hand those that came to their peers; how many there were."""
        with self.lock:
            if self._moving:
                for writer in tuple(self._moving):
                    writer.look()
            try:
                arrived = self._agent.getNotifs({}, ())
            except self._errors as error:
                raise NixlFailed(f"NIXL: {error}") from error
            if not arrived:
                return 0
            count = 0
            for name, messages in arrived.items():
                on_message = self._peers.get(name)
                if on_message is not None:  # else of a life that was forgotten
                    for message in messages:
                        on_message(message)
                        count += 1
            return count

    def _try(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except self._errors as error:
            raise NixlFailed(f"NIXL: {error}") from error

    def writer(self, peer: str, slot: Slot, remote_address: int, on_sent: Callable[[], None]) -> "SlotWriter":
        """What writes a slot of ours into one as large of a peer's arena; `on_sent` is called after each write."""
        return SlotWriter(self, peer, slot, remote_address, on_sent)


def transfer_bytes(length: int) -> int:
    """Bytes to move for a frame: rounded up, by a sixteenth or a page, so that few sizes occur.

    The transfers of those few are kept: making one takes as long as moving 32 KiB. What is moved beyond the frame is
    of an older one to the same peer.
    """
    if length > KEPT_BYTES:
        return length
    step = max(PAGE_BYTES, 1 << max(0, (length - 1).bit_length() - 5))
    return -(-length // step) * step


def _nobody() -> None:
    """Who hears of no write any more."""


class SlotWriter:
    """One-sided writes of a slot's beginning into its counterpart, one at a time; its agent's lock is taken inside."""

    def __init__(
        self, agent: NixlAgent, peer: str, slot: Slot, remote_address: int, on_sent: Callable[[], None]
    ) -> None:
        self._owner = agent
        self._nixl: Any = agent._nixl
        self._agent: Any = agent._agent
        self._peer = peer
        self._address = slot.address
        self._remote = remote_address
        self._capacity = len(slot.frame)
        self._on_sent = on_sent
        self._ready: dict[int, int] = {}  # size in bytes -> transfer that can be posted again and again
        self._moving: int | None = None
        self._moving_once = False

    def post(self, length: int, note: bytes) -> None:
        """Start writing `length` bytes, then `note`. Raises NixlFailed when the peer is gone or one is under way."""
        with self._owner.lock:
            if self._moving is not None:
                self._settle(self._owner._try(self._agent.getXferStatus, self._moving))
            if self._moving is not None:
                raise NixlFailed(f"the last write to {self._peer} has not ended")
            size = min(transfer_bytes(length), self._capacity)
            once = length > KEPT_BYTES
            transfer = self._ready.get(size)
            if transfer is None:
                transfer = self._prepare(size)
                if not once:
                    self._ready[size] = transfer
            self._moving, self._moving_once = transfer, once
            try:
                status = self._agent.postXferReq(transfer, note)
            except self._owner._errors as error:
                raise NixlFailed(f"NIXL: {error}") from error
            self._settle(status)

    @property
    def busy(self) -> bool:
        """Whether a write is under way, as of its agent's last `poll`; one that failed is so until it is closed."""
        return self._moving is not None

    def look(self) -> None:
        """Move a write on; its agent does it, under its lock."""
        if self._moving is not None:
            try:
                self._settle(self._agent.getXferStatus(self._moving))
            except self._owner._errors:  # the peer is gone, which its lease is about to say
                self._owner._moving.discard(self)

    def close(self) -> None:
        """Let go of the transfers; one under way is cancelled, or left to NIXL where that cannot be."""
        with self._owner.lock:
            transfers = set(self._ready.values())
            if self._moving is not None:
                transfers.add(self._moving)
            self._ready.clear()
            self._moving, self._on_sent = None, _nobody  # the pairing, which has this, is free without a collection
            self._owner._moving.discard(self)
            for transfer in transfers:
                try:
                    self._agent.releaseXferReq(transfer)
                except self._owner._errors:
                    continue

    def _settle(self, status: Any) -> None:
        if status == self._nixl.NIXL_IN_PROG:
            self._owner._moving.add(self)
            return
        transfer, self._moving = self._moving, None
        if self._owner._moving:
            self._owner._moving.discard(self)
        if self._moving_once:
            self._owner._try(self._agent.releaseXferReq, transfer)
        self._on_sent()

    def _prepare(self, size: int) -> int:
        nixl = self._nixl
        local = nixl.nixlXferDList(nixl.DRAM_SEG, [(self._address, size, 0)])
        remote = nixl.nixlXferDList(nixl.DRAM_SEG, [(self._remote, size, 0)])
        made: int = self._owner._try(
            self._agent.createXferReq, nixl.NIXL_WRITE, local, remote, self._peer, b"", [self._owner._backend]
        )
        return made
