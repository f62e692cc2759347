"""What a way to reach expert hosts offers: requests go out at once, replies are waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from experts.messages import ForwardReply, ForwardRequest
from router.placement import Host

if TYPE_CHECKING:
    from experts.flight import Lanes
    from experts.near import NearHosts


class Pending(Protocol):
    """A request on its way."""

    def result(self, timeout_s: float) -> ForwardReply:
        """The reply. Raises HostSlow while it has not come, HostUnavailable when the host was lost, or HostRefused."""

    def release(self) -> None:
        """The reply's tensor is no longer needed, or nobody waits for it any more: a late one is dropped."""


class Transport(Protocol):
    """Sends to any host of any placement; hosts come and go without being announced."""

    def submit(self, host: Host, request: ForwardRequest) -> Pending:
        """Send without waiting. Failing to send is reported by the Pending.

        It leaves with `flush`, or when the reply is asked for, at the latest.
        """

    def flush(self) -> None:
        """See that what was submitted leaves now: hosts that are woken together begin together."""

    def lanes(self, hosts: Sequence[Host]) -> Lanes | NearHosts | None:
        """The ways to these hosts for a whole dispatch at once.

        Where all share memory with this process just now, or are in it and on one GPU.
        """

    def forget(self, host: Host) -> None:
        """Drop what is kept open to a host that left."""

    def close(self) -> None:
        """Drop everything; what is pending fails with HostUnavailable."""
