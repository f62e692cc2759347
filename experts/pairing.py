"""One end of a client and a host that write into each other's memory; both ends are alike, by whichever way."""

from abc import ABC, abstractmethod

from experts.arena import Arena
from experts.bell import Ringer


class PairingFailed(Exception):
    """The way to a peer cannot be made, or is gone; the message says why."""


class Pairing(ABC):
    """Slots to write from and slots that the peer writes into. One thread at a time writes, its owner sees to that."""

    near: bool  # whether the peer is on this machine
    incoming: Arena
    outgoing: Arena
    peer = ""

    def __init__(self) -> None:
        self._ringer: Ringer | None = None
        self._holding = self._unrung = False

    @abstractmethod
    def poll(self) -> int:
        """Hand on what has come since; how many notes there were."""

    @abstractmethod
    def write(self, slot: int, length: int, correlation: int) -> None:
        """Send what stands in an outgoing slot; raises PairingFailed when the peer is gone, or still written to."""

    @abstractmethod
    def busy(self, slot: int) -> bool:
        """Whether the last write of a slot is under way still."""

    @abstractmethod
    def close(self) -> None:
        """Write no more: the peer's memory is its own when this returns."""

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

    def ring(self) -> None:
        """Wake the peer, if it can be."""
        self._unrung = False
        if self._ringer is not None:
            self._ringer.ring()

    def _hear(self, bell: str | None) -> None:
        """Ring this bell from now on; raises PairingFailed when it is none."""
        try:
            self._ringer = None if bell is None else Ringer(bell)
        except ValueError as error:
            raise PairingFailed(str(error)) from error

    def _on_sent(self) -> None:
        if self._holding:
            self._unrung = True
        else:
            self.ring()
