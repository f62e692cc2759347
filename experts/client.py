"""The client of the expert hosts: who is asked, how long one waits, and what is known of hosts that fail.

One layer's rows are carried by a `Dispatch` (`experts/dispatch.py`). A host that is lost costs a resend, one that is
slow a hedge; neither costs a request.
"""

import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from experts.dispatch import Dispatch, Part
from experts.dispatch_plan import OwnerTables, hosts_left
from experts.errors import ExpertsUnavailable, FrameError, HostUnavailable
from experts.flight import Flight, take_off
from experts.messages import ForwardReply, ForwardRequest
from experts.near import NearFlight, NearHosts
from experts.transport import Transport
from kernels.combine import SHARED_ROWS, NoOwner, OwnedSlots
from router.gate import Routing
from router.load import LoadMeter
from router.placement import Host, Placement

WAIT_FOR_NEWER_S = 0.25  # between looks at the placement while no holder is left
AVOID_S = 3.0  # a host that was slow is asked again after so long, where others hold the same
SLOWER = 2.0  # a reply is late when it takes so many times longer than the slowest of late
FORGET = 0.995  # of the slowest reply, at each reply


class PlacementSource(Protocol):
    """Where the newest placement table comes from."""

    def snapshot(self) -> Placement:
        """The newest table known here, which the caller uses from now on."""

    def names(self, host: Host) -> bool:
        """Whether the newest table known here names this life."""

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
    resends: int  # parts sent again because their host was lost
    hedges: int  # parts sent to replicas as well because their host was slow
    rows_resent: int  # by both


class ExpertClient:
    """Dispatches one layer's rows at a time; one thread uses it."""

    def __init__(
        self,
        transport: Transport,
        source: PlacementSource,
        deadline_s: float = 30.0,
        reply_timeout_s: float = 10.0,
        hedge_s: float = 0.4,
        clock: Callable[[], float] = time.monotonic,
        meter: LoadMeter | None = None,
        spreads: bool = True,
    ) -> None:
        """A reply is late after `hedge_s` seconds, or later where replies are slow; lost after `reply_timeout_s`.

        `meter` counts the rows of each expert. `spreads`: many rows of an expert may be computed by several holders.
        """
        self._transport = transport
        self._source = source
        self._deadline_s = deadline_s
        self._hedge_s = hedge_s
        self._clock = clock
        self._meter = meter
        self.reply_timeout_s = reply_timeout_s
        self.spreads = spreads
        self._tables: OwnerTables | None = None
        self._slowest_s = 0.0
        self._counts_at: dict[int, int] = {}  # of each layer, where the meter has them
        self._turns: dict[int, int] = {}  # dispatches of each layer
        self._avoided: dict[Host, float] = {}  # until when
        self._dispatches = self._rows = self._sent = self._received = 0
        self._resends = self._hedges = self._rows_resent = 0

    def start(self, layer: int, x_TD: Tensor, routing: Routing, placement: Placement) -> Dispatch:
        """Send every row to the holders of its experts; `Dispatch.finish` waits for the weighted sum."""
        self._dispatches += 1
        turn = self._turns[layer] = self._turns.get(layer, 0) + 1
        tables = self.tables(placement)
        flight = self._fly(layer, x_TD, routing, tables, turn)
        if flight is None and self._meter is not None:
            self._meter.count(layer, routing.experts_TK)
        return Dispatch(self, layer, x_TD, routing, tables, turn, flight)

    def stats(self) -> ClientStats:
        return ClientStats(
            self._dispatches,
            self._rows,
            self._sent,
            self._received,
            self._resends,
            self._hedges,
            self._rows_resent,
        )

    def tables(self, placement: Placement) -> OwnerTables:
        """The owners of a placement, or of a newer one that a lost host led to; who it no longer names is forgotten."""
        if self._tables is None or self._tables.placement.epoch < placement.epoch:
            if self._tables is not None:
                for host in hosts_left(self._tables.placement.hosts, placement.hosts):
                    self._transport.forget(host)
                    self._avoided.pop(host, None)
            self._tables = OwnerTables(placement)
        return self._tables

    def near(self, placement: Placement, device: torch.device) -> NearHosts | None:
        """All hosts of a placement, where they are in this process and on this device, and whose rows nobody counts."""
        lanes = self._transport.lanes(placement.hosts)
        if not isinstance(lanes, NearHosts) or not lanes.computes_on(device) or self._meter is not None:
            return None
        return None if self.avoided else lanes

    def beside(self, placement: Placement) -> int:
        """How many hosts a placement has, where all of them are on this machine, by its memory; else 0."""
        hosts = self.tables(placement).placement.hosts
        return 0 if self._transport.lanes(hosts) is None else len(hosts)

    def _fly(
        self, layer: int, x_TD: Tensor, routing: Routing, tables: OwnerTables, turn: int
    ) -> Flight | NearFlight | None:
        """The whole dispatch at once, where nothing stands against it."""
        hosts, tokens = tables.placement.hosts, x_TD.shape[0]
        lanes = self._transport.lanes(hosts)
        if lanes is None or self.avoided:
            return None
        if isinstance(lanes, NearHosts):
            return self._fly_near(lanes, layer, x_TD, routing, tables)
        if (
            (self.spreads and tokens >= SHARED_ROWS and tables.sharers(layer) is not None)  # rows may go one by one
            or x_TD.dtype is not torch.float32
            or routing.experts_TK.device.type != "cpu"
            or x_TD.device.type != "cpu"
            or not x_TD.is_contiguous()
        ):
            return None
        counted = None if self._meter is None else self._counted(self._meter, layer)
        try:
            flight = take_off(
                lanes,
                tables.owners(layer, turn),
                layer,
                tables.placement.epoch,
                x_TD,
                routing.experts_TK,
                counted,
                self._clock(),
            )
        except NoOwner:
            return None  # which waits for a newer table
        if flight is not None:
            self._rows += flight.rows
            self._sent += 4 * (flight.rows * flight.width + 2 * flight.slots)
        return flight

    def _fly_near(
        self, hosts: NearHosts, layer: int, x_TD: Tensor, routing: Routing, tables: OwnerTables
    ) -> NearFlight | None:
        if not hosts.computes_on(x_TD.device):
            return None
        # by the first turn's table always: they share one device, and a graph keeps to what it was recorded with
        flight = hosts.take_off(tables.owners(layer), layer, x_TD, routing, self._clock())
        if flight is not None:
            self._rows += flight.rows
            if self._meter is not None:
                self._meter.count(layer, routing.experts_TK)
        return flight

    def land(
        self, flight: Flight | NearFlight, weights_TK: Tensor, shared_TD: Tensor | None, residual_TD: Tensor | None
    ) -> Tensor | None:
        """See `Flight.land`."""
        timeout_s = max(0.0, flight.sent_s + self.late_s - self._clock())
        out_TD = flight.land(weights_TK, shared_TD, residual_TD, timeout_s)
        if out_TD is not None:
            self._received += 4 * flight.slots * flight.width
            self._slowest_s = max(FORGET * self._slowest_s, self._clock() - flight.sent_s)
        return out_TD

    def _counted(self, meter: LoadMeter, layer: int) -> int:
        if layer not in self._counts_at:
            self._counts_at[layer] = meter.counts_at(layer)
        return self._counts_at[layer]

    def send(self, host: Host, owned: OwnedSlots, layer: int, x_TD: Tensor, epoch: int) -> Part:
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
        return Part(host, owned.slot_P, rows, self._transport.submit(host, request), self._clock())

    def flush(self) -> None:
        """What was sent leaves now."""
        self._transport.flush()

    def receive(self, part: Part, hidden: int, timeout_s: float) -> ForwardReply:
        """The reply to one part.

        Raises HostSlow when it has not come in time, HostUnavailable, HostRefused, or FrameError when it is another's.
        """
        reply = part.pending.result(timeout_s)
        if reply.generation != part.host.generation:
            part.pending.release()
            raise HostUnavailable(f"{part.host.id}: a reply of generation {reply.generation}, an older life")
        pairs = part.slot_P.shape[0]
        if reply.y_PD.shape != (pairs, hidden):
            shape = tuple(reply.y_PD.shape)
            part.pending.release()
            raise FrameError(f"{part.host.id} replied {shape}; expected {(pairs, hidden)}")
        self._received += 4 * pairs * hidden
        self._slowest_s = max(FORGET * self._slowest_s, self._clock() - part.sent_s)
        return reply

    @property
    def late_s(self) -> float:
        """How long to wait for a reply before it is late."""
        return min(max(self._hedge_s, SLOWER * self._slowest_s), self.reply_timeout_s)

    @property
    def avoided(self) -> Container[Host]:
        """Hosts that were slow a moment ago."""
        if self._avoided:
            now_s = self._clock()
            self._avoided = {host: until_s for host, until_s in self._avoided.items() if until_s > now_s}
        return self._avoided

    def slow(self, host: Host, reason: str) -> None:
        """A host is late: whoever supervises it may look whether it is there at all."""
        self._avoided[host] = self._clock() + AVOID_S
        self._source.report(host, reason)

    def hedged(self, rows: int) -> None:
        """A late host's rows were sent to its replicas, too."""
        self._hedges += 1
        self._rows_resent += rows

    def replaced(self, host: Host) -> bool:
        """Whether the newest table no longer names this life."""
        return not self._source.names(host)

    def lost(self, host: Host, rows: int, reason: str) -> None:
        """A host failed: tell its supervisor, and open a new stream should it be asked again."""
        self._resends += 1
        self._rows_resent += rows
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
