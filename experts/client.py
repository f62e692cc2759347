"""The client of the expert hosts: groups rows by host, sends, puts replies back by slot, and sums in slot order.

The sum is taken here, in fp32, slot by slot, so where experts live, how many replicas they have and which of
them answered never change a bit. A host that fails costs a resend, not a request.
Shapes: `T` tokens, `K` experts a token, `D` model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from experts.dispatch_plan import OwnerTables, hosts_left
from experts.errors import ExpertsUnavailable, FrameError, HostRefused, HostUnavailable
from experts.messages import ForwardReply, ForwardRequest
from experts.transport import Pending, Transport
from kernels.combine import NoOwner, OwnedSlots, combine_slots, split_slots
from router.gate import Routing
from router.placement import Host, Placement

WAIT_FOR_NEWER_S = 0.25  # between looks at the placement while no holder is left


class PlacementSource(Protocol):
    """Where the newest placement table comes from."""

    def snapshot(self) -> Placement:
        """The newest table known here."""

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        """A table newer than `epoch` as soon as there is one; the newest known after `timeout_s` seconds."""

    def report(self, host: Host, reason: str) -> None:
        """Tell whoever supervises hosts that one did not answer; returns at once."""


@dataclass(frozen=True, slots=True)
class ClientStats:
    """Counts since the client was made."""

    dispatches: int
    rows_sent: int
    bytes_sent: int
    bytes_received: int
    resends: int


class ExpertClient:
    """Dispatches one layer's rows at a time; one thread uses it."""

    def __init__(
        self,
        transport: Transport,
        source: PlacementSource,
        deadline_s: float = 30.0,
        reply_timeout_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._source = source
        self._deadline_s = deadline_s
        self._reply_timeout_s = reply_timeout_s
        self._clock = clock
        self._tables: OwnerTables | None = None
        self._dispatches = self._rows = self._sent = self._received = self._resends = 0

    def start(self, layer: int, x_TD: Tensor, routing: Routing, placement: Placement) -> "Dispatch":
        """Send every row to the holders of its experts; `Dispatch.finish` waits for the weighted sum."""
        self._dispatches += 1
        return Dispatch(self, layer, x_TD, routing, self.tables(placement))

    def stats(self) -> ClientStats:
        return ClientStats(self._dispatches, self._rows, self._sent, self._received, self._resends)

    def tables(self, placement: Placement) -> OwnerTables:
        """The owners of a placement, or of a newer one that a lost host led to; who it no longer names is forgotten."""
        if self._tables is None or self._tables.placement.epoch < placement.epoch:
            if self._tables is not None:
                for host in hosts_left(self._tables.placement.hosts, placement.hosts):
                    self._transport.forget(host)
            self._tables = OwnerTables(placement)
        return self._tables

    def send(self, host: Host, owned: OwnedSlots, layer: int, x_TD: Tensor, epoch: int) -> Pending:
        """One host's part of one layer, on its way."""
        rows = owned.row_R.shape[0]
        request = ForwardRequest(
            epoch=epoch,
            generation=host.generation,
            layer=layer,
            x_RD=x_TD if rows == x_TD.shape[0] else x_TD.index_select(0, owned.row_R),
            pair_row_P=owned.slot_row_P,
            pair_expert_P=owned.slot_expert_P,
        )
        self._rows += rows
        self._sent += 4 * (rows * x_TD.shape[1] + 2 * owned.slot_P.shape[0])
        return self._transport.submit(host, request)

    def receive(self, pending: Pending, host: Host, pairs: int, hidden: int) -> ForwardReply:
        """The reply to one part; raises HostUnavailable, HostRefused, or FrameError when it is another's."""
        reply = pending.result(self._reply_timeout_s)
        if reply.generation != host.generation:
            pending.release()
            raise HostUnavailable(f"{host.id}: a reply of generation {reply.generation}, an older life")
        if reply.y_PD.shape != (pairs, hidden):
            shape = tuple(reply.y_PD.shape)
            pending.release()
            raise FrameError(f"{host.id} replied {shape}; expected {(pairs, hidden)}")
        self._received += 4 * pairs * hidden
        return reply

    def lost(self, host: Host, reason: str) -> None:
        """A host failed: tell its supervisor, and open a new stream should it be asked again."""
        self._resends += 1
        self._transport.forget(host)
        self._source.report(host, reason)

    def newer(
        self, placement: Placement, started_s: float, layer: int, experts: tuple[int, ...], last: str
    ) -> Placement:
        """Wait for a table that may have a holder for `experts`; raises ExpertsUnavailable past the deadline."""
        left_s = started_s + self._deadline_s - self._clock()
        if left_s <= 0:
            raise ExpertsUnavailable(layer, experts, self._deadline_s, last)
        return self._source.wait_newer(placement.epoch, min(left_s, WAIT_FOR_NEWER_S))

    def now_s(self) -> float:
        return self._clock()


@dataclass(frozen=True, slots=True)
class _Sent:
    """One host's part of a dispatch."""

    host: Host
    slot_P: Tensor
    pending: Pending


class Dispatch:
    """One layer's rows on their way. Between start and finish the caller computes the shared experts."""

    def __init__(self, client: ExpertClient, layer: int, x_TD: Tensor, routing: Routing, tables: OwnerTables) -> None:
        self._client = client
        self._layer = layer
        self._device = x_TD.device
        self._x_TD = x_TD.float().cpu()
        self._weights_TK = routing.weights_TK
        self._experts_TK = routing.experts_TK.cpu()
        self._tables = tables
        self._failed: dict[Host, str] = {}
        self._started_s = client.now_s()
        self._last = "no host was asked"
        self._sent = self._send(None)

    def finish(self, shared_TD: Tensor | None = None, residual_TD: Tensor | None = None) -> Tensor:
        """residual + (the weighted sum over slots + shared), [T, D] fp32.

        Raises ExpertsUnavailable when some expert had no reachable holder for the client's whole deadline, and
        HostRefused when a host refuses the request as malformed, which no resend can mend.
        """
        hidden = self._x_TD.shape[1]
        answers: list[tuple[Tensor, Tensor]] = []
        answered: list[Pending] = []
        try:
            while self._sent:
                unanswered: list[Tensor] = []
                for sent in self._sent:
                    try:
                        reply = self._client.receive(sent.pending, sent.host, sent.slot_P.shape[0], hidden)
                    except HostUnavailable as error:
                        self._fail(sent.host, str(error))
                        unanswered.append(sent.slot_P)
                    except HostRefused as refusal:
                        if not refusal.may_pass:
                            raise
                        self._fail(sent.host, str(refusal))
                        unanswered.append(sent.slot_P)
                    else:
                        answers.append((sent.slot_P, reply.y_PD.to(self._device)))
                        answered.append(sent.pending)
                self._sent = self._send(torch.cat(unanswered).sort().values) if unanswered else []
            return combine_slots(answers, self._weights_TK, shared_TD, residual_TD)
        finally:
            for pending in answered:
                pending.release()

    def _send(self, slots: Tensor | None) -> list[_Sent]:
        """Send these slots (None: all) to holders that have not failed, waiting for a newer table while none is."""
        while True:
            placement = self._tables.placement
            try:
                owner_E = self._tables.owners(self._layer, self._failed)
                parts = split_slots(self._experts_TK, owner_E, len(placement.hosts), slots)
            except NoOwner as unheld:
                newer = self._client.newer(placement, self._started_s, self._layer, (unheld.expert,), self._last)
                if newer.epoch == placement.epoch:
                    self._failed.clear()  # the same life may have come back: ask it again
                self._tables = self._client.tables(newer)
            else:
                return [
                    _Sent(
                        host := placement.hosts[part.owner],
                        part.slot_P,
                        self._client.send(host, part, self._layer, self._x_TD, placement.epoch),
                    )
                    for part in parts
                ]

    def _fail(self, host: Host, reason: str) -> None:
        self._failed[host] = reason
        self._last = reason
        self._client.lost(host, reason)
