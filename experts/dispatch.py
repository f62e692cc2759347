"""One layer's rows on their way: grouped by host, sent, put back by slot, and summed in slot order.

The sum is taken here, in fp32, slot by slot, so where experts live, how many replicas they have and which of
them answered never change a bit.
Shapes: `T` tokens, `K` experts a token, `D` model, `P` slots of one host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experts.errors import ExpertError, FrameError, HostRefused, HostSlow, HostUnavailable
from experts.flight import Flight
from experts.messages import ForwardReply
from experts.transport import Pending
from kernels.combine import SHARED_ROWS, NoOwner, combine_slots, split_shared, split_slots
from router.gate import Routing
from router.placement import Host

if TYPE_CHECKING:
    from experts.client import ExpertClient
    from experts.dispatch_plan import OwnerTables
    from experts.near import NearFlight

POLL_S = 0.01  # between looks at who answers first, and at the placement, while a reply is late


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One host's part of a dispatch."""

    host: Host
    slot_P: Tensor
    rows: int
    pending: Pending
    sent_s: float


Answer = tuple[Part, ForwardReply]


class Dispatch:
    """Between start and finish the caller computes the shared experts."""

    def __init__(
        self,
        client: ExpertClient,
        layer: int,
        x_TD: Tensor,
        routing: Routing,
        tables: OwnerTables,
        turn: int,
        flight: Flight | NearFlight | None = None,
    ) -> None:
        """`flight`: all of it is on its way already."""
        self._client = client
        self._layer = layer
        self._device = x_TD.device
        self._x_TD = x_TD
        self._routing = routing
        self._weights_TK = routing.weights_TK
        self._tables = tables
        self._turn = turn
        self._failed: dict[Host, str] = {}
        self._started_s = client.now_s()
        self._last = "no host was asked"
        self._flight = flight
        self._sent = self._send(None) if flight is None else []

    def finish(self, shared_TD: Tensor | None = None, residual_TD: Tensor | None = None) -> Tensor:
        """residual + (the weighted sum over slots + shared), [T, D] fp32.

        Raises ExpertsUnavailable when some expert had no reachable holder for the client's whole deadline, and
        HostRefused when a host refuses the request as malformed, which no resend can mend.
        """
        if self._flight is not None:
            out_TD = self._client.land(self._flight, self._weights_TK, shared_TD, residual_TD)
            if out_TD is not None:
                return out_TD
            assert isinstance(self._flight, Flight)  # the other has come to its end
            self._sent = self._taken_apart(self._flight)
        answers: list[Answer] = []
        try:
            while self._sent:
                unanswered: list[Tensor] = []
                for part in self._sent:
                    try:
                        answers.extend(self._collect(part))
                    except (HostUnavailable, HostRefused, FrameError) as error:
                        if isinstance(error, HostRefused) and not error.may_pass:
                            raise
                        self._fail(part, str(error))
                        unanswered.append(part.slot_P)
                self._sent = self._send(torch.cat(unanswered).sort().values) if unanswered else []
            outputs = [(part.slot_P, reply.y_PD.to(self._device)) for part, reply in answers]
            return combine_slots(outputs, self._weights_TK, shared_TD, residual_TD)
        finally:
            _release(part for part, _ in answers)
            self.abandon()  # where an error left some

    @cached_property
    def _sent_rows(self) -> Tensor:
        """The rows, [T, D], as they are sent."""
        return self._x_TD.float().cpu()

    @cached_property
    def _chosen(self) -> Tensor:
        """The experts of every slot, [T, K], where the split is computed."""
        return self._routing.experts_TK.cpu()

    def abandon(self) -> None:
        """Nobody waits for what was sent any more; after `finish`, nothing is left to give up."""
        if self._flight is not None:
            self._flight.abandon()
        sent, self._sent = self._sent, []
        _release(sent)

    def _taken_apart(self, flight: Flight) -> list[Part]:
        """Something is not as it should be: each host's part for itself."""
        return [Part(host, slot_P, rows, call, flight.sent_s) for host, slot_P, rows, call in flight.calls()]

    def _collect(self, part: Part) -> list[Answer]:
        """What answers a part's slots: its own reply, or those of replicas when it is late and they are first."""
        client = self._client
        try:
            return [(part, self._receive(part, max(0.0, part.sent_s + client.late_s - client.now_s())))]
        except HostSlow as late:
            client.slow(part.host, str(late))
        rivals = self._hedge(part)
        if rivals:
            won = self._race(part, rivals)
            if won:
                return won
        return [(part, self._outwait(part))]

    def _race(self, late: Part, rivals: Sequence[Part]) -> list[Answer]:
        """The late host's reply, or all of its rivals', whichever is first; nothing when a rival fails.

        Raises HostUnavailable, HostRefused or FrameError when the late host fails and the rivals are not all there.
        """
        answers: list[Answer] = []
        lost: ExpertError | None = None
        won: list[Answer] = []
        waiting = list(rivals)
        try:
            while waiting and not won:
                if lost is None:
                    try:
                        won = [(late, self._receive(late, 0.0))]
                    except HostSlow as slow:
                        lost = self._hopeless(late, slow)
                    except (HostUnavailable, HostRefused, FrameError) as error:
                        lost = error
                try:
                    if not won:
                        answers.append((waiting[0], self._receive(waiting[0], POLL_S)))
                        del waiting[0]
                        won = [] if waiting else answers
                except HostSlow as slow:
                    if self._hopeless(waiting[0], slow) is not None:
                        break
                except (HostUnavailable, HostRefused, FrameError) as error:
                    self._fail(waiting[0], str(error))
                    break
            if lost is not None and not won:
                raise lost
            return won
        finally:
            kept = [part for part, _ in won] or ([late] if lost is None else [])
            _release(part for part in (late, *rivals) if part not in kept)
            lost = None  # an error that its own frame refers to keeps all that this one does

    def _outwait(self, part: Part) -> ForwardReply:
        """The reply of a late host that has no rival; raises HostUnavailable once there is no hope for it."""
        while True:
            try:
                return self._receive(part, POLL_S)
            except HostSlow as slow:
                lost = self._hopeless(part, slow)
                if lost is not None:
                    part.pending.release()
                    try:
                        raise lost from slow
                    finally:
                        del lost  # or it keeps this frame, and so the call

    def _hopeless(self, part: Part, slow: HostSlow) -> HostUnavailable | None:
        """Why a late reply is not waited for any longer."""
        if self._client.replaced(part.host):
            return HostUnavailable(f"{part.host.id}: a newer table does not name this life any more")
        if self._client.now_s() > part.sent_s + self._client.reply_timeout_s:
            return HostUnavailable(str(slow))
        return None

    def _hedge(self, part: Part) -> list[Part]:
        """The part once more, to replicas alone; nothing where one of its experts has no other holder."""
        self._keep_up()
        failed = {**self._failed, part.host: "late"}
        try:
            parts = self._split(failed, part.slot_P)
        except NoOwner:
            return []
        self._client.hedged(part.rows)
        return parts

    def _receive(self, part: Part, timeout_s: float) -> ForwardReply:
        return self._client.receive(part, self._x_TD.shape[1], timeout_s)

    def _send(self, slots: Tensor | None) -> list[Part]:
        """Send these slots (None: all) to holders that have not failed, waiting for a newer table while none is."""
        while True:
            self._keep_up()
            placement = self._tables.placement
            try:
                return self._split(self._failed, slots)
            except NoOwner as unheld:
                newer = self._client.newer(placement, self._started_s, self._layer, (unheld.expert,), self._last)
                if newer.epoch == placement.epoch:
                    self._failed.clear()  # the same life may have come back: ask it again
                self._tables = self._client.tables(newer)

    def _keep_up(self) -> None:
        """Ask nobody by an older table than another dispatch of this client has gone on to."""
        self._tables = self._client.tables(self._tables.placement)

    def _split(self, failed: Mapping[Host, str], slots: Tensor | None) -> list[Part]:
        placement, hosts, avoided = self._tables.placement, len(self._tables.placement.hosts), self._client.avoided
        owner_E = self._tables.owners(self._layer, self._turn, failed, avoided)
        spread = self._client.spreads and self._chosen.shape[0] >= SHARED_ROWS  # for one expert to have as many
        sharers = self._tables.sharers(self._layer, failed, avoided) if spread else None
        if sharers is None:
            parts = split_slots(self._chosen, owner_E, hosts, slots)
        else:
            turn = self._layer + self._turn
            parts = split_shared(self._chosen, owner_E, sharers.holder_EC, sharers.holders_E, turn, hosts, slots)
        sent = [
            self._client.send(placement.hosts[part.owner], part, self._layer, self._sent_rows, placement.epoch)
            for part in parts
        ]
        self._client.flush()
        return sent

    def _fail(self, part: Part, reason: str) -> None:
        self._failed[part.host] = reason
        self._last = reason
        self._client.lost(part.host, part.rows, reason)


def _release(parts: Iterable[Part]) -> None:
    for part in parts:
        part.pending.release()
