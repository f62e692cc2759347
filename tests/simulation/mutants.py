"""Code that is broken on purpose, one way each: what the simulator must find."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attention.engine import Engine
from attention.replay import Replay
from attention.requests import GenerateRequest, Update
from attention.scheduler import Scheduler
from attention.sequence import Sequence
from cluster.actions import Action, Save
from cluster.change import Change
from cluster.conductor import Conductor
from cluster.roster import HostReport
from cluster.transaction import Transaction
from experts import dispatch
from experts.client import ExpertClient
from experts.dispatch import Answer, Dispatch, Part
from experts.dispatch_plan import OwnerTables
from experts.errors import FrameError, HostRefused, HostUnavailable
from experts.messages import ForwardReply
from router.placement import Placement

Mutant = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def retry_dropped() -> contextlib.AbstractContextManager[None]:
    """What a lost host should have computed stays zero."""
    collect = Dispatch._collect

    def lossy(self: Dispatch, part: Part) -> list[Answer]:
        try:
            return collect(self, part)
        except (HostUnavailable, HostRefused, FrameError):
            zeros = torch.zeros(part.slot_P.shape[0], self._x_TD.shape[1])
            return [(part, ForwardReply(part.host.generation, zeros))]

    return _patched((Dispatch, "_collect", lossy))


def halves_part_ways() -> contextlib.AbstractContextManager[None]:
    """A half of a step goes on asking by the table that the other has left behind."""
    return _patched((Dispatch, "_keep_up", lambda self: None))


def fencing_off() -> contextlib.AbstractContextManager[None]:
    """Replies of older lives are taken."""

    def receive(self: ExpertClient, part: Part, hidden: int, timeout_s: float) -> ForwardReply:
        return part.pending.result(timeout_s)

    return _patched((ExpertClient, "receive", receive))


def sum_in_order_of_arrival() -> contextlib.AbstractContextManager[None]:
    """Each token's experts are summed in the order in which their hosts stand in the answers."""

    def combine(
        answers: list[tuple[Tensor, Tensor]], weights_TK: Tensor, shared_TD: Tensor | None, residual_TD: Tensor | None
    ) -> Tensor:
        tokens, top_k = weights_TK.shape
        slots_S = torch.cat([slot_P for slot_P, _ in answers])
        y_SD = torch.cat([y_PD for _, y_PD in answers])
        by_token = (slots_S // top_k).argsort(stable=True)
        y_TKD = y_SD[by_token].view(tokens, top_k, -1)
        weights_TK = weights_TK.reshape(-1)[slots_S[by_token]].view(tokens, top_k)
        slots = [(torch.arange(tokens * top_k), y_TKD.reshape(tokens * top_k, -1))]
        return plain(slots, weights_TK, shared_TD, residual_TD)

    plain = dispatch.combine_slots
    return _patched((dispatch, "combine_slots", combine))


def seed_lost_on_replay() -> contextlib.AbstractContextManager[None]:
    """Another worker draws with a seed of its own."""
    begin = Replay.begin

    def forgetful(self: Replay) -> GenerateRequest:
        request = begin(self)
        return replace(request, params=replace(request.params, seed=0)) if request.resumed_ids else request

    return _patched((Replay, "begin", forgetful))


def tokens_forgotten_on_replay() -> contextlib.AbstractContextManager[None]:
    """Another worker begins at the prompt."""
    begin = Replay.begin
    return _patched((Replay, "begin", lambda self: replace(begin(self), resumed_ids=())))


def scores_repeated_on_replay() -> contextlib.AbstractContextManager[None]:
    """The scores of the prompt come again."""

    def take(self: Replay, update: Update) -> Update:
        self._sent.extend(update.token_ids)
        return update

    return _patched((Replay, "take", take))


def epoch_ignored() -> contextlib.AbstractContextManager[None]:
    """A client keeps its first table."""

    def tables(self: ExpertClient, placement: Placement) -> OwnerTables:
        self._tables = self._tables or OwnerTables(placement)
        return self._tables

    return _patched((ExpertClient, "tables", tables))


def retire_at_once() -> contextlib.AbstractContextManager[None]:
    """Old holders go while workers still use the old table."""
    return _patched((Conductor, "_workers_moved", lambda *_: True))


def commit_at_once() -> contextlib.AbstractContextManager[None]:
    """A change is committed before everything is loaded."""
    commit = Transaction._commit

    def hasty(self: Transaction, change: Change, now_s: float) -> None:
        loading, change.loading = change.loading, {}
        with mock.patch.object(type(change.target), "held_by", return_value=frozenset()):
            commit(self, change, now_s)
        change.loading = loading

    return _patched((Transaction, "_commit", hasty))


def save_forgotten() -> contextlib.AbstractContextManager[None]:
    """A controller that comes back knows nothing."""
    act = Conductor.act

    def forgetful(self: Conductor, now_s: float) -> list[Action]:
        return [action for action in act(self, now_s) if not isinstance(action, Save)]

    return _patched((Conductor, "act", forgetful))


def saved_too_late() -> contextlib.AbstractContextManager[None]:
    """What must be remembered is saved after what stands on it was done."""
    act = Conductor.act

    def late(self: Conductor, now_s: float) -> list[Action]:
        return sorted(act(self, now_s), key=lambda action: isinstance(action, Save))

    return _patched((Conductor, "act", late))


def workers_unknown_after_recovery() -> contextlib.AbstractContextManager[None]:
    """A controller that comes back thinks that there are no workers."""
    begin = Conductor.__init__

    def careless(self: Conductor, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self._heard_s = -math.inf

    return _patched((Conductor, "__init__", careless))


def frozen_not_ended() -> contextlib.AbstractContextManager[None]:
    """A life that does not answer is replaced, and lives on."""

    def probed(self: Conductor, host_id: str, generation: int, alive: bool, now_s: float) -> None:
        self._suspects.pop(host_id, None)
        if not alive:
            self.host_died(host_id, generation, "it does not answer", now_s)

    return _patched((Conductor, "probed", probed))


def frozen_not_noticed() -> contextlib.AbstractContextManager[None]:
    """Nobody looks after a host that does not answer."""
    return _patched((Conductor, "suspected", lambda *_: None))


def hedge_in_wrong_slots() -> contextlib.AbstractContextManager[None]:
    """What a replica computed instead of a late host is put elsewhere."""
    hedge = Dispatch._hedge

    def askew(self: Dispatch, part: Part) -> list[Part]:
        return [replace(rival, slot_P=rival.slot_P.flip(0)) for rival in hedge(self, part)]

    return _patched((Dispatch, "_hedge", askew))


def hedge_added_to_the_late_reply() -> contextlib.AbstractContextManager[None]:
    """Both the late host's reply and its rivals' are used."""
    collect = Dispatch._collect

    def both(self: Dispatch, part: Part) -> list[Answer]:
        answers = collect(self, part)
        return answers if answers[0][0] is part else [*answers, answers[0]]

    return _patched((Dispatch, "_collect", both))


def memory_used_again() -> contextlib.AbstractContextManager[None]:
    """A reply's memory is given back while it is still read."""
    receive = ExpertClient.receive

    def hasty(self: ExpertClient, part: Part, hidden: int, timeout_s: float) -> ForwardReply:
        reply = receive(self, part, hidden, timeout_s)
        part.pending.release()
        return reply

    return _patched((ExpertClient, "receive", hasty))


def calls_left_open() -> contextlib.AbstractContextManager[None]:
    """Nobody releases what lost a race."""
    return _patched((dispatch, "_release", lambda parts: None))


def strays_left_alone() -> contextlib.AbstractContextManager[None]:
    """Hosts that an interrupted change left are not ended."""
    begin = Conductor.__init__

    def careless(self: Conductor, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self._leftovers.clear()

    def ready(self: Conductor, report: HostReport, now_s: float) -> None:
        self.roster.ready(report)

    return _patched(
        (Conductor, "__init__", careless), (Conductor, "host_ready", ready), (Conductor, "wants", lambda *_: True)
    )


def blocks_leaked() -> contextlib.AbstractContextManager[None]:
    """A cancelled request keeps its blocks."""
    remove = Scheduler.remove

    def cancel(self: Engine, request_id: str) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            unfinished = sequence.generated < sequence.params.max_tokens
            remove(self._scheduler, _Kept(sequence) if unfinished else sequence)  # type: ignore[arg-type]

    return _patched((Engine, "cancel", cancel))


class _Kept:
    """Looks like a sequence that has no blocks."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self.blocks: list[int] = []

    def __eq__(self, other: object) -> bool:
        return other is self._sequence

    __hash__ = None  # type: ignore[assignment]


def joiners_kept() -> contextlib.AbstractContextManager[None]:
    """A change that is undone leaves the hosts that it started."""
    roll_back = Transaction._roll_back

    def careless(self: Transaction, change: Change, reason: str, now_s: float) -> None:
        change.joining = {}
        roll_back(self, change, reason, now_s)

    return _patched((Transaction, "_roll_back", careless))


MUTANTS: tuple[Mutant, ...] = (
    retry_dropped,
    halves_part_ways,
    fencing_off,
    sum_in_order_of_arrival,
    seed_lost_on_replay,
    tokens_forgotten_on_replay,
    scores_repeated_on_replay,
    epoch_ignored,
    retire_at_once,
    commit_at_once,
    save_forgotten,
    saved_too_late,
    workers_unknown_after_recovery,
    frozen_not_ended,
    frozen_not_noticed,
    hedge_in_wrong_slots,
    hedge_added_to_the_late_reply,
    memory_used_again,
    calls_left_open,
    strays_left_alone,
    blocks_leaked,
    joiners_kept,
)
