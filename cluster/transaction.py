"""At most one change at a time, carried from the wish to its end."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from cluster.actions import Abandon, Action, Load, StartHost, StopHost
from cluster.change import Change, ChangeRefused, Deadlines, Phase, Wish, pairs_to_load
from cluster.events import EventLog
from cluster.plan import ModelShape, membership, new_ids, target
from cluster.roster import HostView, Roster
from cluster.saved import Committed
from router.holding import Pair
from router.placement import Host

Loads = Callable[[float], Mapping[int, Sequence[float]]]  # of each layer's experts, at a time
REMEMBERED = 32  # changes that can still be asked about


class Transaction:
    """The running change, if any. `committed` is replaced as a whole, in one assignment, or not at all."""

    def __init__(
        self,
        shape: ModelShape,
        roster: Roster,
        committed: Committed,
        loads: Loads,
        events: EventLog,
        deadlines: Deadlines,
        numbered: int,
    ) -> None:
        self._shape = shape
        self._roster = roster
        self._loads = loads
        self._events = events
        self._deadlines = deadlines
        self.numbered = numbered  # changes so far
        self.committed = committed
        self.change: Change | None = None
        self.history: deque[Change] = deque(maxlen=REMEMBERED)
        self._asked: set[str] = set()  # joining hosts that were started
        self._actions: list[Action] = []

    @property
    def preparing(self) -> bool:
        """True while hosts may hold what no table names yet."""
        return self.change is not None and self.change.phase in (Phase.PLAN, Phase.PREPARE)

    def begin(self, wish: Wish, now_s: float) -> Change:
        """Start on a wish; raises ChangeRefused when it cannot be had, or another change is under way."""
        if self.change is not None:
            running = f"{self.change.id} ({self.change.wish.kind}, phase '{self.change.phase}')"
            raise ChangeRefused(f"{running} is under way: ask again when it is over", busy=True)
        before = self.committed
        plan = membership(wish, before.members, before.replicas, before.extra, self._shape)
        self.numbered += 1
        ids = new_ids(before.members, plan.joining)
        self.change = Change(
            id=f"change-{self.numbered}",
            wish=wish,
            started_s=now_s,
            deadline_s=now_s + self._deadlines.plan_s,
            joining={host_id: self._roster.begin(host_id, now_s).generation for host_id in ids},
            leaving=plan.leaving,
            replicas=plan.replicas,
            extra=plan.extra,
            phase_since_s=now_s,
        )
        self.history.append(self.change)
        self._events.record("change_begun", now_s, change=self.change.id, what=wish.kind, why=wish.why or "asked for")
        return self.change

    def advance(self, epoch: int, workers_moved: bool, now_s: float) -> list[Action]:
        """Go on as far as what is known allows."""
        change = self.change
        if change is not None:
            if change.phase is Phase.PLAN:
                self._plan(change, now_s)
            if change.phase is Phase.PREPARE:
                self._commit(change, now_s)
            elif change.phase is Phase.RETIRE:
                self._retire(change, epoch, workers_moved, now_s)
            if self.preparing and now_s >= change.deadline_s:
                self._roll_back(change, f"the phase '{change.phase}' was not over by its deadline", now_s)
        actions, self._actions = self._actions, []
        return actions

    def lost(self, host_id: str, generation: int, reason: str, now_s: float) -> None:
        """A life ended; a change that cannot be without it is undone."""
        change = self.change
        if change is not None and self.preparing and change.involves(host_id, generation):
            self._roll_back(change, f"{host_id} was lost: {reason}", now_s)

    def progressed(self, change_id: str, host_id: str, pairs: int) -> None:
        """A host has loaded so many of the pairs that it was asked to."""
        if self.change is not None and self.change.id == change_id:
            self.change.progress[host_id] = pairs
            self.change.version += 1

    def loaded(self, change_id: str, host_id: str, generation: int) -> None:
        """A host has loaded all of them."""
        if self.change is not None and self.change.id == change_id and self._roster.find(host_id, generation):
            self.change.loading.pop(host_id, None)
            self.change.version += 1

    def failed(self, change_id: str, host_id: str, generation: int, reason: str, now_s: float) -> None:
        """A host cannot load them."""
        change = self.change
        if change is not None and self.preparing and change.id == change_id and self._roster.find(host_id, generation):
            self._roll_back(change, f"{host_id}: {reason}", now_s)

    def _staying(self, change: Change) -> list[HostView]:
        ids = (*self.committed.members, *change.joining)
        return [self._roster.views[host_id] for host_id in ids if host_id not in change.leaving]

    def _plan(self, change: Change, now_s: float) -> None:
        for host_id, generation in change.joining.items():
            if host_id not in self._asked:
                self._asked.add(host_id)
                self._actions.append(StartHost(host_id, generation, frozenset()))
        staying = self._staying(change)
        if any(view.state != "ready" or view.dropping for view in staying):
            return  # what a host still drops can be neither counted on nor loaded again
        before, loads = self.committed.holding, self._loads(now_s)
        try:
            change.target = target(self._shape, staying, before, loads, change.replicas, change.extra)
        except ValueError as error:
            self._roll_back(change, str(error), now_s)
            return
        change.loading = pairs_to_load(change.target, {view.id: view.held for view in staying})
        change.takers = frozenset(change.loading)
        change.pairs = sum(map(len, change.loading.values()))
        change.enter(Phase.PREPARE, now_s, now_s + self._deadlines.prepare_s)
        for host_id, pairs in change.loading.items():
            generation = self._roster.views[host_id].generation
            self._actions.append(Load(change.id, host_id, generation, pairs, self._sources(pairs)))

    def _sources(self, pairs: frozenset[Pair]) -> dict[Pair, Host]:
        """A living holder of each pair that has one. Holders take turns, so that none alone sends all."""
        sources: dict[Pair, Host] = {}
        for number, (layer, expert) in enumerate(sorted(pairs)):
            holders = (self._roster.views.get(host_id) for host_id in self.committed.holding.holders[layer][expert])
            able = [view for view in holders if view is not None and (layer, expert) in view.held]
            if able:
                sources[layer, expert] = able[number % len(able)].host
        return sources

    def _commit(self, change: Change, now_s: float) -> None:
        assert change.target is not None
        staying, target = self._staying(change), change.target
        if change.loading or any(v.state != "ready" or not target.held_by(v.id) <= v.held for v in staying):
            return  # who was restarted meanwhile comes back first
        members = tuple(view.id for view in staying)
        self.committed = Committed(target, members, change.replicas, change.extra)
        change.enter(Phase.RETIRE, now_s, now_s + self._deadlines.retire_s)
        self._events.record("change_committed", now_s, change=change.id, pairs=change.pairs)

    def _retire(self, change: Change, epoch: int, workers_moved: bool, now_s: float) -> None:
        """Leaving hosts go once nobody asks them any more. A late worker is refused, and finds the new table."""
        if change.epoch is None:
            change.epoch = epoch
            change.version += 1
        if workers_moved or now_s >= change.deadline_s:
            for host_id in change.leaving:
                self._stop(host_id)
            surplus = any(view.held - self.committed.holding.held_by(view.id) for view in self._roster)
            if not surplus or now_s >= change.deadline_s + self._deadlines.retire_s:
                self._end(change, Phase.DONE, now_s)

    def _roll_back(self, change: Change, reason: str, now_s: float) -> None:
        change.reason = reason
        for host_id in change.joining:
            self._stop(host_id)
        for host_id in change.loading:
            view = self._roster.views.get(host_id)
            if host_id not in change.joining and view is not None and view.state == "ready":
                self._actions.append(Abandon(change.id, host_id, view.generation))
        self._end(change, Phase.ROLLED_BACK, now_s)

    def _stop(self, host_id: str) -> None:
        view = self._roster.views.get(host_id)
        if view is not None:
            self._actions.append(StopHost(host_id, view.generation))
            self._roster.remove(host_id)

    def _end(self, change: Change, phase: Phase, now_s: float) -> None:
        change.enter(phase, now_s)
        self.change = None
        self._asked.clear()
        seconds = round(now_s - change.started_s, 6)
        self._events.record(f"change_{phase}", now_s, change=change.id, seconds=seconds, reason=change.reason or "")
