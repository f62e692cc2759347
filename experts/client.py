"""The client of the expert hosts: groups rows by host, sends, puts replies back by slot, and sums in slot order.

The sum is taken here, in fp32, slot by slot, so where experts live, how many replicas they have and which of
them answered never change a bit. A host that fails costs a resend, not a request.
Shapes: `T` tokens, `K` experts a token, `D` model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from experts.dispatch_plan import Ints, Share, UnheldExperts, hosts_left, plan_shares
from experts.errors import ExpertsUnavailable, FrameError, HostRefused, HostUnavailable
from experts.messages import ForwardReply, ForwardRequest
from experts.transport import Pending, Transport
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
        self._hosts: tuple[Host, ...] = ()
        self._dispatches = self._rows = self._sent = self._received = self._resends = 0

    def start(self, layer: int, x_TD: Tensor, routing: Routing, placement: Placement) -> "Dispatch":
        """Send every row to the holders of its experts; `Dispatch.finish` waits for the weighted sum."""
        if placement.hosts != self._hosts:
            for host in hosts_left(self._hosts, placement.hosts):
                self._transport.forget(host)
            self._hosts = placement.hosts
        self._dispatches += 1
        return Dispatch(self, layer, x_TD, routing, placement)

    def stats(self) -> ClientStats:
        return ClientStats(self._dispatches, self._rows, self._sent, self._received, self._resends)

    def send(self, share: Share, layer: int, x_TD: Tensor, epoch: int) -> Pending:
        """One host's share of one layer, on its way."""
        request = ForwardRequest(
            epoch=epoch,
            generation=share.host.generation,
            layer=layer,
            x_RD=x_TD[torch.from_numpy(share.rows_R)],
            pair_row_P=torch.from_numpy(share.pair_row_P.astype(np.int32)),
            pair_expert_P=torch.from_numpy(share.pair_expert_P.astype(np.int32)),
        )
        self._rows += len(share.rows_R)
        self._sent += 4 * (request.x_RD.numel() + 2 * len(share.slots_P))
        return self._transport.submit(share.host, request)

    def receive(self, pending: Pending, share: Share, hidden: int) -> ForwardReply:
        """The reply to a share; raises HostUnavailable, HostRefused, or FrameError when it is another's."""
        reply = pending.result(self._reply_timeout_s)
        if reply.generation != share.host.generation:
            raise HostUnavailable(f"{share.host.id}: a reply of generation {reply.generation}, an older life")
        if reply.y_PD.shape != (len(share.slots_P), hidden):
            raise FrameError(
                f"{share.host.id} replied {tuple(reply.y_PD.shape)}; expected {(len(share.slots_P), hidden)}"
            )
        self._received += 4 * reply.y_PD.numel()
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


class Dispatch:
    """One layer's rows on their way. Between start and finish the caller computes the shared experts."""

    def __init__(self, client: ExpertClient, layer: int, x_TD: Tensor, routing: Routing, placement: Placement) -> None:
        self._client = client
        self._layer = layer
        self._device = x_TD.device
        self._x_TD = x_TD.float().cpu()
        self._weights_TK = routing.weights_TK
        self._experts_TK: Ints = routing.experts_TK.cpu().numpy()
        self._placement = placement
        self._failed: dict[Host, str] = {}
        self._turn = layer
        self._started_s = client.now_s()
        self._last = "no host was asked"
        self._sent = self._send(np.arange(self._experts_TK.size))

    def finish(self) -> Tensor:
        """The weighted sum over slots, [T, D] fp32.

        Raises ExpertsUnavailable when some expert had no reachable holder for the client's whole deadline, and
        HostRefused when a host refuses the request as malformed, which no resend can mend.
        """
        tokens, top_k = self._experts_TK.shape
        hidden = self._x_TD.shape[1]
        y_SD = torch.empty(tokens * top_k, hidden)
        while self._sent:
            unanswered: list[Ints] = []
            for share, pending in self._sent:
                try:
                    reply = self._client.receive(pending, share, hidden)
                except HostUnavailable as error:
                    self._fail(share, str(error))
                    unanswered.append(share.slots_P)
                except HostRefused as refusal:
                    if not refusal.may_pass:
                        raise
                    self._fail(share, str(refusal))
                    unanswered.append(share.slots_P)
                else:
                    y_SD[torch.from_numpy(share.slots_P)] = reply.y_PD
            self._sent = self._send(np.sort(np.concatenate(unanswered))) if unanswered else []
        y_TKD = y_SD.view(tokens, top_k, hidden).to(self._device)
        total_TD = self._weights_TK[:, :1] * y_TKD[:, 0]
        for slot in range(1, top_k):
            total_TD = total_TD + self._weights_TK[:, slot : slot + 1] * y_TKD[:, slot]
        return total_TD

    def _send(self, slots_P: Ints) -> list[tuple[Share, Pending]]:
        """Send these slots to holders that have not failed, waiting for a newer table while there is none."""
        while True:
            try:
                shares = plan_shares(self._experts_TK, slots_P, self._layer, self._placement, self._failed, self._turn)
            except UnheldExperts as unheld:
                newer = self._client.newer(self._placement, self._started_s, self._layer, unheld.experts, self._last)
                if newer.epoch == self._placement.epoch:
                    self._failed.clear()  # the same life may have come back: ask it again
                self._placement = newer
            else:
                return [
                    (share, self._client.send(share, self._layer, self._x_TD, self._placement.epoch))
                    for share in shares
                ]

    def _fail(self, share: Share, reason: str) -> None:
        self._failed[share.host] = reason
        self._last = reason
        self._client.lost(share.host, reason)
