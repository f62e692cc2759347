"""A request that was written to a host: a Pending whose reply is read where it arrived."""

from typing import Protocol

from experts.client_slots import SlotTable
from experts.errors import HostSlow, HostUnavailable
from experts.messages import ForwardReply


class Waiter(Protocol):
    """What waits for the reply in a slot."""

    slots: SlotTable

    def wait(self, slot: int, correlation: int, timeout_s: float) -> ForwardReply:
        """See `Pending.result`. After any error but HostSlow the slot is the waiter's to free."""


class LeaseCall:
    """Made when the request is on its way."""

    __slots__ = ("_correlation", "_reply", "_slot", "_waiter", "_waiting")

    def __init__(self, waiter: Waiter, slot: int, correlation: int) -> None:
        self._waiter = waiter
        self._slot = slot
        self._correlation = correlation
        self._waiting = True
        self._reply: ForwardReply | None = None

    def result(self, timeout_s: float) -> ForwardReply:
        """The reply, whose y is a view of memory that `release` gives back. See `Pending.result`."""
        if self._reply is None:
            if not self._waiting:
                raise HostUnavailable("this call is over: it failed, or its reply was released")
            self._waiting = False
            try:
                self._reply = self._waiter.wait(self._slot, self._correlation, timeout_s)
            except HostSlow:
                self._waiting = True
                raise
        return self._reply

    def release(self) -> None:
        """The reply's memory may be used again; without a reply, nobody will ask for it. Twice is once."""
        if self._reply is not None:
            self._reply = None
            self._waiter.slots.release(self._slot)
        elif self._waiting:
            self._waiting = False
            self._waiter.slots.abandon(self._slot)

    def __del__(self) -> None:
        if self._waiting:  # never asked for: its slot must not stay taken
            self._waiter.slots.drop(self._slot)
