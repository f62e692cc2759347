"""A training worker's client of the expert hosts: one step's forward and backward, with the hosts that it began with.

Shapes: `T` tokens, `K` experts a token, `E` experts, `D` model, `S` = T · K slots, `P` slots of one host, `A` answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.client import ExpertClient
from experts.dispatch import Dispatch
from experts.dispatch_plan import NOBODY, OwnerTables
from experts.errors import FrameError, HostRefused, HostSlow, HostUnavailable
from experts.training.messages import BackwardReply, BackwardRequest
from experts.training.peer import Peers, PendingGradients
from experts.training.step_hosts import StepHosts, StepLost, StepPlacement
from experts.training.waiting import Waiting
from experts.transport import Transport
from kernels.combine import OwnedSlots, combine_slots, split_slots
from router.gate import Routing
from router.placement import Host, Placement

LOOK_S = 0.5  # between looks whether a host that has not answered is still there


@dataclass(frozen=True, slots=True)
class _Sent:
    host: Host
    slot_A: Tensor
    pending: PendingGradients


class TrainingClient:
    """One worker's; one thread uses it."""

    def __init__(
        self,
        transport: Transport,
        peers: Peers,
        source: StepPlacement,
        rank: int,
        hidden_size: int,
        deadline_s: float = 600.0,
    ) -> None:
        """A host that has not answered a backward request after `deadline_s` seconds is lost."""
        # an expert's rows stay together: backward needs what forward made of them, and torch's bits go by their number
        self._experts = ExpertClient(
            transport, source, deadline_s=deadline_s, reply_timeout_s=deadline_s, spreads=False
        )
        self._peers = peers
        self._source = source
        self._rank = rank
        self._hidden = hidden_size
        self._deadline_s = deadline_s
        self._hosts: StepHosts | None = None

    def begin(self, step: int, placement: Placement) -> StepHosts:
        """Use this table until the next step."""
        self._source.use(placement)
        self._hosts = StepHosts(step, placement, OwnerTables(placement))
        return self._hosts

    @property
    def hosts(self) -> StepHosts:
        if self._hosts is None:
            raise RuntimeError("no step was begun")
        return self._hosts

    def start(self, layer: int, x_TD: Tensor, routing: Routing) -> Dispatch:
        """Send rows to their experts; `Dispatch.finish` waits, and raises StepLost where it cannot be had."""
        return self._experts.start(layer, x_TD, routing, self.hosts.placement)

    def backward(
        self, layer: int, micro: int, x_TD: Tensor, dout_TD: Tensor, routing: Routing, keep_TK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """dx [T, D] and dweights [T, K] fp32 of the weighted sum over slots, whose gradient is dout [T, D].

        Every holder of an expert gets its rows and adds to its gradients; slots that are not kept count for nothing.
        Raises StepLost when an expert has no holder left.
        """
        call = _LayerCall(layer, micro, x_TD.float().cpu(), dout_TD.float().cpu(), routing)
        slots = None if keep_TK is None else keep_TK.reshape(-1).nonzero().squeeze(1).cpu()
        answers: list[tuple[Tensor, BackwardReply]] = []
        asked: list[_Sent] = []
        wanted: Tensor | None = slots if slots is not None else torch.arange(routing.experts_TK.numel())
        everyone = True
        try:
            while wanted is not None:
                lost = []
                for one in self._send(call, slots, wanted, everyone, asked):
                    try:
                        answers.append((one.slot_A, self._receive(one, x_TD.shape[1])))
                    except (HostUnavailable, HostRefused, FrameError) as error:
                        if isinstance(error, HostRefused) and not error.may_pass:
                            raise
                        self.fail(one.host, str(error))
                        lost.append(one.slot_A)
                missing = torch.cat(lost).sort().values if lost else torch.empty(0, dtype=torch.int64)
                wanted = missing if len(missing) else None
                everyone = False
            return self._combine(call, answers, slots)
        finally:
            for one in asked:
                one.pending.release()

    def skip(self, micro: int) -> None:
        """This worker has no rows in a micro-batch; the hosts wait for none."""
        placement = self.hosts.placement
        for layer in placement.owners:
            nothing = torch.empty(0, 1, dtype=torch.int64)
            x_TD = torch.empty(0, self._hidden)
            call = _LayerCall(layer, micro, x_TD, x_TD, Routing(nothing, nothing.float()))
            for one in self._send(call, None, torch.empty(0, dtype=torch.int64), True, []):
                try:
                    self._receive(one, self._hidden)
                except (HostUnavailable, HostRefused) as error:
                    self.fail(one.host, str(error))

    def fail(self, host: Host, reason: str) -> None:
        """A host takes no part in the rest of this step."""
        self.hosts.failed[host] = reason
        self._peers.forget(host)
        self._source.report(host, reason)

    def _send(
        self, call: _LayerCall, slots: Tensor | None, wanted: Tensor, everyone: bool, asked: list[_Sent]
    ) -> list[_Sent]:
        """Ask for the wanted slots; at first everyone is told of all that it holds, afterwards only who is asked.

        What is sent is added to `asked`, also where an error ends it.
        """
        hosts = self.hosts
        owner_E = hosts.tables.owners(call.layer, hosts.step, hosts.failed)
        expert_S = call.routing.experts_TK.reshape(-1).cpu()
        unheld = owner_E[expert_S[wanted]] == NOBODY
        if unheld.any():
            expert = int(expert_S[wanted][unheld][0])
            raise StepLost(f"layer {call.layer}: no holder of expert {expert} is left; {self._last_failure()}")
        wanted_S = torch.zeros(len(expert_S), dtype=torch.bool)
        wanted_S[wanted] = True
        sent: list[_Sent] = []
        for index, (host, held_E) in enumerate(zip(hosts.placement.hosts, hosts.held(call.layer), strict=True)):
            if host in hosts.failed or not held_E.any():
                continue
            owned = _owned_slots(call.routing.experts_TK.cpu(), held_E, slots)
            answer_P = wanted_S[owned.slot_P] & (owner_E[owned.slot_expert_P.long()] == index)
            if everyone or answer_P.any():
                request = self._request(call, host, owned, answer_P)
                sent.append(_Sent(host, owned.slot_P[answer_P], self._peers.peer(host).backward(request)))
                asked.append(sent[-1])
        return sent

    def _request(self, call: _LayerCall, host: Host, owned: OwnedSlots, answer_P: Tensor) -> BackwardRequest:
        return BackwardRequest(
            generation=host.generation,
            step=self.hosts.step,
            micro=call.micro,
            rank=self._rank,
            layer=call.layer,
            x_RD=call.x_TD.index_select(0, owned.row_R),
            dout_RD=call.dout_TD.index_select(0, owned.row_R),
            pair_row_P=owned.slot_row_P,
            pair_expert_P=owned.slot_expert_P,
            pair_weight_P=call.routing.weights_TK.detach().reshape(-1).cpu()[owned.slot_P],
            answer_P=answer_P.int(),
        )

    def _receive(self, sent: _Sent, hidden: int) -> BackwardReply:
        waiting = Waiting(self._source, sent.host, "backward", self._deadline_s)
        while True:
            try:
                reply = sent.pending.result(LOOK_S)
                break
            except HostSlow:
                waiting.still()
        expected = (len(sent.slot_A), hidden)
        if reply.generation != sent.host.generation or reply.dx_AD.shape != expected:
            raise FrameError(
                f"{sent.host.id} replied {tuple(reply.dx_AD.shape)} in generation {reply.generation}; "
                f"expected {expected} in {sent.host.generation}"
            )
        return reply

    def _combine(
        self, call: _LayerCall, answers: Sequence[tuple[Tensor, BackwardReply]], slots: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        experts_TK = call.routing.experts_TK
        device = call.routing.weights_TK.device
        parts = [(slot_A, reply.dx_AD.to(device)) for slot_A, reply in answers if len(slot_A)]
        dweight_S = torch.zeros(experts_TK.numel())
        for slot_A, reply in answers:
            dweight_S[slot_A] = reply.dweight_A
        if slots is not None:
            dropped_S = torch.ones(experts_TK.numel(), dtype=torch.bool)
            dropped_S[slots] = False
            dropped_A = dropped_S.nonzero().squeeze(1)
            if len(dropped_A):
                parts.append((dropped_A, torch.zeros(len(dropped_A), call.x_TD.shape[1], device=device)))
        dx_TD = combine_slots(parts, torch.ones(experts_TK.shape, device=device))
        return dx_TD, dweight_S.view(experts_TK.shape).to(device)

    def _last_failure(self) -> str:
        failed = self.hosts.failed
        return next(reversed(failed.values())) if failed else "none was there"


@dataclass(frozen=True, slots=True)
class _LayerCall:
    layer: int
    micro: int
    x_TD: Tensor
    dout_TD: Tensor
    routing: Routing


def _owned_slots(experts_TK: Tensor, held_E: Tensor, slots: Tensor | None) -> OwnedSlots:
    """Every slot, of those that count, whose expert a host holds."""
    held_S = held_E[experts_TK.reshape(-1)]
    if slots is not None:
        kept_S = torch.zeros_like(held_S)
        kept_S[slots] = True
        held_S &= kept_S
    mine = held_S.nonzero().squeeze(1)
    parts = split_slots(experts_TK, torch.zeros(len(held_E), dtype=torch.int32), 1, mine)
    if parts:
        return parts[0]
    long, ints = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    return OwnedSlots(0, long, long, ints, ints)
