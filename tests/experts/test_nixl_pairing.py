"""A pairing by NIXL where something fails, or comes early: nothing stays registered, and no host stumbles."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from experts.arena import PAGE_BYTES, SLOTS, Arena
from experts.host_lease import HostLease
from experts.lease import NOTE
from experts.nixl_agent import NixlFailed
from experts.nixl_pairing import NixlPairing


class Agent:
    """Knows what is registered; what is named in `failing` it refuses to do."""

    name = "agent"

    def __init__(self) -> None:
        self.registered: list[Arena] = []
        self.failing: set[object] = set()
        self.written: list[bytes] = []
        self.on_peer: Callable[[], object] = lambda: None  # happens in another thread once a peer is known

    def register(self, arena: Arena) -> Arena:
        self._do(arena)
        self.registered.append(arena)
        return arena

    def deregister(self, arena: Arena) -> None:
        self._do(("free", id(arena)))
        self.registered.remove(arena)

    def metadata(self, arena: Arena) -> bytes:
        self._do("metadata")
        return b"metadata"

    def add_peer(self, *given: object) -> None:
        self.on_peer()

    def remove_peer(self, name: str) -> None:
        return

    def writer(self, *given: object) -> Any:
        return SimpleNamespace(busy=False, post=lambda length, note: self.written.append(note), close=lambda: None)

    def _do(self, what: object) -> None:
        if what in self.failing:
            raise NixlFailed(f"{what}: no")


@pytest.fixture
def agent() -> Agent:
    return Agent()


def arenas() -> tuple[Arena, Arena]:
    return Arena(PAGE_BYTES, SLOTS), Arena(PAGE_BYTES, SLOTS)


@pytest.mark.parametrize("failing", ["outgoing", "metadata"])
def test_a_pairing_that_cannot_be_made_leaves_nothing_registered(agent: Agent, failing: str) -> None:
    """As where a process may not pin more memory."""
    outgoing, incoming = arenas()
    agent.failing = {outgoing if failing == "outgoing" else failing}
    with pytest.raises(NixlFailed):
        NixlPairing(agent, False, outgoing, incoming)  # type: ignore[arg-type]
    assert agent.registered == []


def test_an_arena_that_cannot_be_let_go_keeps_no_other(agent: Agent) -> None:
    outgoing, incoming = arenas()
    pairing = NixlPairing(agent, False, outgoing, incoming)  # type: ignore[arg-type]
    agent.failing = {("free", id(incoming))}
    pairing.close()
    assert agent.registered == [incoming]


def test_what_a_client_says_before_its_lease_is_granted_is_refused(agent: Agent) -> None:
    """The loop may be told of it as soon as the agent knows the client, and must not end with it."""
    pairing = NixlPairing(agent, False, *arenas())  # type: ignore[arg-type]
    lease = HostLease(pairing, 0, PAGE_BYTES)
    agent.on_peer = lambda: lease.job(NOTE.pack(0, 100, 7))
    pairing.connect("client", b"", 0, None, lambda note: None)
    assert [NOTE.unpack(note)[2] for note in agent.written] == [7]


def test_the_loop_does_not_wait_for_the_end_of_a_lease(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes to a client that died are waited for a while, and others are to be answered meanwhile."""
    lease = HostLease(NixlPairing(agent, False, *arenas()), 0, PAGE_BYTES)  # type: ignore[arg-type]
    closing, let_go = threading.Event(), threading.Event()
    monkeypatch.setattr(lease.pairing, "close", lambda: (closing.set(), let_go.wait(10)))
    ending = threading.Thread(target=lease.end, daemon=True)
    ending.start()
    assert closing.wait(10)
    loop = threading.Thread(target=lease.send, args=(0, 100, 1), daemon=True)
    loop.start()
    loop.join(5)
    try:
        assert not loop.is_alive()
        assert agent.written == []
    finally:
        let_go.set()
        ending.join(10)
