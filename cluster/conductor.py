"""The controller's mind: told what happened, asked what to do next. No Ray, no clock, no threads of its own.

The same code runs in the controller's actor and in the simulator. `act` never waits: it returns actions, in order, and
whoever carries them out tells the outcome later. Every outcome names the life it belongs to, so one that comes late,
twice or from an older life changes nothing.
"""

import math

from cluster.actions import Action, GiveUp, Probe, Publish, Retire, Save, StartHost, StopHost
from cluster.change import Change, Deadlines, Phase, Wish, not_ready
from cluster.events import EventLog
from cluster.plan import ModelShape
from cluster.roster import START_ATTEMPTS, HostReport, Roster
from cluster.saved import Committed, SavedState
from cluster.transaction import Loads, Transaction
from router.holding import Pair
from router.placement import Placement

WORKERS_HEARD_S = 3.0  # after an earlier controller's death, until every worker that lives was heard of again


class Conductor:
    """Hosts, placement and changes of one service."""

    def __init__(
        self,
        shape: ModelShape,
        initial: Committed,
        loads: Loads,
        events: EventLog,
        saved: SavedState | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        """`initial` is what a service begins with, `saved` where an earlier life of this controller left off.

        With `saved`, tell of the hosts that are still there by `host_ready` before the first `act`.
        """
        self.events = events
        self.shape = shape
        self.roster = Roster(saved.generations if saved is not None else None)
        self.epoch = saved.epoch if saved is not None else 0
        self.placement: Placement | None = None
        self.ever_ready = self.epoch > 0
        self.reason: str | None = None  # why the service cannot start
        self._workers: dict[str, int] = {}
        self._suspects: dict[str, tuple[int, bool]] = {}  # generation, and whether it was asked already
        self._advances: dict[str, tuple[int, int, float]] = {}  # of lives that start: generation, pairs, since when
        self._stops: list[StopHost] = []
        self._leftovers: set[tuple[str, int]] = set()  # lives to stop once no worker uses an earlier controller's table
        self._heard_s: float | None = None if saved is not None else -math.inf  # when all workers are known
        self._saved = saved
        self._deadlines = deadlines or Deadlines()
        self._seen: tuple[int, Committed] | None = None  # what the table was last made of
        committed = saved.committed if saved is not None else initial
        numbered = saved.changes if saved is not None else 0
        self._transaction = Transaction(shape, self.roster, committed, loads, events, self._deadlines, numbered)
        for host_id in committed.members:
            self.roster.expect(host_id)
        for host_id, generation in self.roster.generations.items():
            if host_id not in committed.members:  # an interrupted change may have left it
                self._leftovers.add((host_id, generation))

    @property
    def committed(self) -> Committed:
        return self._transaction.committed

    @property
    def state(self) -> SavedState:
        """What the next life has to know."""
        return SavedState(self.epoch, dict(self.roster.generations), self.committed, self._transaction.numbered)

    @property
    def change(self) -> Change | None:
        """The one that is under way."""
        return self._transaction.change

    @property
    def changes(self) -> list[Change]:
        """The last changes, the newest last."""
        return list(self._transaction.history)

    def find_change(self, change_id: str) -> Change | None:
        """One of the last changes, under way or over."""
        return next((change for change in self._transaction.history if change.id == change_id), None)

    def host_ready(self, report: HostReport, now_s: float) -> None:
        """A life serves: one that was started here, or before an earlier controller died."""
        if self.roster.ready(report):
            began_s = self.roster.views[report.host_id].started_s
            took = {"seconds": round(now_s - began_s, 3)} if began_s > -math.inf else {}
            self.events.record("host_ready", now_s, host=report.host_id, generation=report.generation, **took)
            if len(self.roster.arithmetics()) > 1:
                self.events.record("hosts_differ", now_s, host=report.host_id, arithmetic=report.arithmetic)
        elif (report.host_id, report.generation) not in self._leftovers:
            self._stops.append(StopHost(report.host_id, report.generation))

    def host_died(self, host_id: str, generation: int, reason: str, now_s: float) -> None:
        """A life ended, however."""
        if self.roster.died(host_id, generation, reason, now_s):
            self.events.record("host_died", now_s, host=host_id, generation=generation, reason=reason)
            self._suspects.pop(host_id, None)
            self._transaction.lost(host_id, generation, reason, now_s)

    def give_up(self, reason: str) -> None:
        """No host can be had any more, and none will."""
        self.reason = self.reason or reason

    def host_failed(self, host_id: str, generation: int, reason: str, now_s: float) -> None:
        """A life cannot load what it should; while the service was never ready, no other life could either."""
        view = self.roster.find(host_id, generation)
        if view is not None and view.state == "loading" and not self.ever_ready:
            self.reason = reason
        self.host_died(host_id, generation, reason, now_s)

    def host_progress(self, host_id: str, generation: int, pairs: int, now_s: float) -> None:
        """A life that starts has loaded so many pairs."""
        known = self._advances.get(host_id, (0, 0, now_s))
        if self.roster.find(host_id, generation) is not None and (generation, pairs) > known[:2]:
            self._advances[host_id] = (generation, pairs, now_s)

    def load_progress(self, change_id: str, host_id: str, pairs: int, now_s: float) -> None:
        """So many pairs of a running `Load` are there."""
        change = self.change
        if change is not None and change.id == change_id and pairs > change.progress.get(host_id, 0):
            self._transaction.progressed(change_id, host_id, pairs)
            if change.phase is Phase.PREPARE:
                change.deadline_s = now_s + self._deadlines.prepare_s

    def loaded(self, change_id: str, host_id: str, generation: int, pairs: frozenset[Pair]) -> None:
        """A living host took pairs; those that nobody wants any more will be retired."""
        self.roster.took(host_id, generation, pairs)
        self._transaction.loaded(change_id, host_id, generation)

    def load_failed(self, change_id: str, host_id: str, generation: int, reason: str, now_s: float) -> None:
        """A living host took none of the pairs of a `Load`."""
        self._transaction.failed(change_id, host_id, generation, reason, now_s)

    def retired(self, host_id: str, generation: int, pairs: frozenset[Pair]) -> None:
        """A living host dropped pairs."""
        self.roster.dropped(host_id, generation, pairs)

    def suspected(self, host_id: str, generation: int, reason: str, now_s: float) -> None:
        """A worker could not reach a life, or got no answer in time."""
        view = self.roster.find(host_id, generation)
        if view is not None and view.state == "ready" and host_id not in self._suspects:
            self.events.record("host_suspected", now_s, host=host_id, generation=generation, reason=reason)
            self._suspects[host_id] = (generation, False)

    def probed(self, host_id: str, generation: int, alive: bool, now_s: float) -> None:
        """Whether a suspect answered. Slow is not dead; who does not answer at all is ended, and cannot come back."""
        if self._suspects.get(host_id) == (generation, True):
            del self._suspects[host_id]
        if not alive and self.roster.find(host_id, generation) is not None:
            self.host_died(host_id, generation, "it does not answer", now_s)
            self._stops.append(StopHost(host_id, generation, insist=True))

    def wants(self, host_id: str, generation: int) -> bool:
        """False for a life that was declared dead, or belongs to a change that was undone."""
        view = self.roster.find(host_id, generation)
        return (host_id, generation) in self._leftovers or (view is not None and view.state != "dead")

    def worker_at(self, worker_id: str, epoch: int) -> None:
        """A worker uses no table older than this epoch, and will not."""
        self._workers[worker_id] = epoch

    def worker_left(self, worker_id: str) -> None:
        self._workers.pop(worker_id, None)

    def request(self, wish: Wish, now_s: float) -> Change:
        """Begin a change; raises ChangeRefused when it cannot be had, or another one is under way.

        Save `state` before anybody hears of it: its id would be another's after a restart.
        """
        if not self.ever_ready or self.reason is not None:
            raise not_ready(self.reason)
        return self._transaction.begin(wish, now_s)

    def act(self, now_s: float) -> list[Action]:
        """What to do now, in this order."""
        if self._heard_s is None:
            self._heard_s = now_s + WORKERS_HEARD_S
        if self.reason is None:
            actions = self._start_hosts(now_s)
        if self.reason is not None:
            return [GiveUp(self.reason)]
        self._give_up_loading(now_s)
        actions += self._transaction.advance(self.epoch, self._workers_moved(now_s), now_s)
        actions += self._publish(now_s)
        actions += self._retire(now_s)
        for host_id, (generation, asked) in tuple(self._suspects.items()):
            if not asked:
                self._suspects[host_id] = (generation, True)
                actions.append(Probe(host_id, generation))
        actions += self._stops
        self._stops = []
        state = self.state
        if state != self._saved:
            self._saved = state
            actions.insert(0, Save(state))
        return actions

    def _start_hosts(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        for host_id in self.committed.members:
            if not self.roster.due(host_id, now_s):
                continue
            deaths = self.roster.views[host_id].quick_deaths
            if not self.ever_ready and deaths >= START_ATTEMPTS:
                self.reason = f"{host_id} died {deaths} times while starting"
                return []
            view = self.roster.begin(host_id, now_s)
            self.events.record("host_started", now_s, host=host_id, generation=view.generation)
            actions.append(StartHost(host_id, view.generation, self.committed.holding.held_by(host_id)))
        return actions

    def _give_up_loading(self, now_s: float) -> None:
        """A life that hangs before it serves would never be missed; one that gets on has its time."""
        for view in self.roster:
            _, _, advanced_s = self._advances.get(view.id, (0, 0, view.started_s))
            since_s = max(view.started_s, advanced_s)  # which is an earlier life's where this one loaded nothing yet
            if view.state == "loading" and now_s >= since_s + self._deadlines.prepare_s:
                self.host_died(view.id, view.generation, "it was not ready by its deadline", now_s)
                self._stops.append(StopHost(view.id, view.generation, insist=True))

    def _publish(self, now_s: float) -> list[Action]:
        if self._seen is not None and self._seen[0] == self.roster.version and self._seen[1] is self.committed:
            return []
        self._seen = (self.roster.version, self.committed)
        members = (self.roster.views[host_id] for host_id in self.committed.members)
        ready = [view for view in members if view.state == "ready"]
        held = {view.id: view.held for view in ready}
        newest = self.committed.holding.table(self.epoch + 1, [view.host for view in ready], held)
        current = self.placement
        if newest is None or (current and (current.hosts, current.owners) == (newest.hosts, newest.owners)):
            return []
        self.epoch, self.placement, self.ever_ready = newest.epoch, newest, True
        self.events.record("epoch", now_s, epoch=newest.epoch, hosts=len(ready))
        return [Publish(newest)]

    def _retire(self, now_s: float) -> list[Action]:
        """Drop what no table in use names: not while a change prepares it, nor before every worker has moved."""
        change = self.change
        overdue = change is not None and change.phase is Phase.RETIRE and now_s >= change.deadline_s
        if self.placement is None:  # the last table is an earlier controller's, and may name what is committed no more
            return []
        if self._transaction.preparing or not (self._workers_moved(now_s) or overdue):
            return []
        actions: list[Action] = [StopHost(*life) for life in sorted(self._leftovers)]
        self._leftovers.clear()
        for view in self.roster:
            surplus = view.held - self.committed.holding.held_by(view.id)
            if surplus and view.id in self.committed.members and not view.dropping:
                self.roster.drops(view.id, view.generation, surplus)
                actions.append(Retire(view.id, view.generation, surplus))
        return actions

    def _workers_moved(self, now_s: float) -> bool:
        heard = self._heard_s is not None and now_s >= self._heard_s
        return heard and all(epoch >= self.epoch for epoch in self._workers.values())
