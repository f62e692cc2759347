"""The controller, as cluster/controller_body.py and cluster/fleet.py are: it carries out, tells, dies and returns."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from cluster.actions import Action, GiveUp, Publish, Save, StartHost
from cluster.change import Change, ChangeRefused, Deadlines, Wish
from cluster.conductor import Conductor
from cluster.events import EventLog
from cluster.saved import Committed, SavedState
from router.placement import Placement
from tests.simulation.clock import Violation
from tests.simulation.hosts import HostProcess
from tests.simulation.session import Session

if TYPE_CHECKING:
    from tests.simulation.workers import Worker
    from tests.simulation.world import World

TICK_S = 0.25
SILENT_S = 3.0
DEADLINES = Deadlines(plan_s=6.0, prepare_s=4.0, retire_s=3.0)


class Shell:
    """At most one session at a time."""

    def __init__(self, world: "World", initial: Committed) -> None:
        self._world = world
        self._initial = initial
        self._kept: str | None = None  # what a crash does not take
        self._crashes = 0
        self._session: Session | None = None
        self._placement: Placement | None = None
        self._crash_after: int | None = None  # actions
        self._acting = False
        self._told: set[str] = set()  # ids of changes, over all lives
        self._boot()

    @property
    def conductor(self) -> Conductor | None:
        return None if self._session is None else self._session.conductor

    @property
    def up(self) -> bool:
        """Whether there is a controller, which has taken over what an earlier one started."""
        return self._session is not None and self._session.adopted

    @property
    def crashed(self) -> bool:
        """Whether there was an earlier conductor than this."""
        return self._crashes > 0

    def crash(self, after_actions: int | None = None) -> None:
        """Now, or before one of the next actions is carried out."""
        if after_actions is not None:
            self._crash_after = after_actions
            return
        self._crash_after = None
        if self._session is None:
            return
        self._world.note("controller_crashed")
        self._session.over = True
        self._session, self._placement = None, None
        self._crashes += 1
        self._world.clock.after(self._world.between(0.2, 3.0), self._boot)

    def request(self, wish: Wish) -> Change | None:
        """What somebody wants of the service; None when it was refused."""
        conductor = self.conductor
        if conductor is None:
            return None
        running = conductor.change
        try:
            change = conductor.request(wish, self._world.clock.now_s)
        except ChangeRefused as refused:
            self._world.note("refused", wish.kind, str(refused))
            if refused.busy != (running is not None or not conductor.ever_ready):
                raise Violation(f"{wish} was refused with busy={refused.busy}, while {running} is under way") from None
            return None
        if running is not None:
            raise Violation(f"{wish} was begun while {running.id} is under way")
        if change.id in self._told:
            raise Violation(f"{wish} has the id of an earlier change, {change.id}")
        self._told.add(change.id)
        self._kept = conductor.state.to_json()
        self._world.note("wish", wish.kind, wish.hosts, wish.leaving, wish.replicas)
        self._act()
        return change

    def wants(self, host_id: str, generation: int) -> bool:
        """Whether a life should go on."""
        session = self._session
        return session is None or not session.adopted or session.conductor.wants(host_id, generation)

    def tell_from(self, worker: "Worker", tell: Callable[["Shell"], None]) -> None:
        """A message of a worker, which comes if there is a way, and somebody to hear it."""
        world = self._world

        def arrive() -> None:
            if self._session is not None and worker.cut_until_s <= world.clock.now_s:
                tell(self)

        if worker.cut_until_s <= world.clock.now_s:
            world.clock.after(world.between(0.002, 0.05), arrive)

    def heartbeat(self, worker: "Worker", epoch: int) -> None:
        assert self._session is not None
        if worker.alive:
            worker.heard = True
        self._session.seen[worker.id] = self._world.clock.now_s
        self._world.watch.returned(worker.id)
        self._session.conductor.worker_at(worker.id, epoch)
        self._act()

    def suspected(self, host_id: str, generation: int, reason: str) -> None:
        assert self._session is not None
        self._session.conductor.suspected(host_id, generation, reason, self._world.clock.now_s)
        self._act()

    def placement_for(self, worker: "Worker") -> Placement | None:
        return self._placement if worker.cut_until_s <= self._world.clock.now_s else None

    def host_ended(self, process: HostProcess) -> None:
        """A process died: the cluster tells, a while later, whoever watches then."""
        delay_s = self._world.between(0.02, 0.6)
        self._world.clock.after(delay_s, partial(self._gone, process))

    def _gone(self, process: HostProcess) -> None:
        session, life = self._session, (process.id, process.generation)
        if session is not None and session.lives.pop(life, None) is not None:
            session.conductor.host_died(*life, "its process ended", self._world.clock.now_s)
            self._act()

    def _boot(self) -> None:
        world = self._world
        saved = SavedState.from_json(self._kept) if self._kept is not None else None
        conductor = Conductor(
            world.reference.shape, self._initial, world.loads, EventLog(world.event), saved, DEADLINES
        )
        session = self._session = Session(world, conductor, self._act)
        world.note("controller_began", self._crashes, 0 if saved is None else saved.epoch)
        wait_s = 0.0
        for host_id, generation in (saved.generations if saved is not None else {}).items():
            process = world.find(host_id, generation)
            if process is not None and process.alive:
                wait_s = max(wait_s, session.adopt(process))
        world.clock.after(wait_s + 0.01, partial(self._begin, session))

    def _begin(self, session: Session) -> None:
        if not session.over:
            session.adopted = True
            self._tick(session)

    def _tick(self, session: Session) -> None:
        if not session.over:
            now_s = self._world.clock.now_s
            for worker_id in [worker for worker, seen_s in session.seen.items() if seen_s < now_s - SILENT_S]:
                del session.seen[worker_id]
                self._world.watch.left(worker_id)
                session.conductor.worker_left(worker_id)
            self._world.clock.after(TICK_S, partial(self._tick, session))
            self._act()

    def _act(self) -> None:
        session = self._session
        if session is None or not session.adopted or self._acting:
            return
        self._acting = True
        try:
            self._world.watch.before(session.conductor)
            actions = session.conductor.act(self._world.clock.now_s)
            self._world.watch.after(session.conductor)
            for action in actions:
                if self._crash_after is not None:
                    if self._crash_after == 0:
                        self.crash()
                        return
                    self._crash_after -= 1
                self._carry_out(session, action)
        finally:
            self._acting = False

    def _carry_out(self, session: Session, action: Action) -> None:
        world = self._world
        if isinstance(action, Save):
            self._kept = action.state.to_json()
            world.note("save", action.state.epoch)
        elif isinstance(action, Publish):
            self._publish(action.placement)
        elif isinstance(action, StartHost):
            session.start(action)
        elif isinstance(action, GiveUp):
            raise Violation(f"a service that was ready was given up: {action.reason}")
        else:
            session.ask(action)

    def _publish(self, placement: Placement) -> None:
        self._world.watch.published(placement)
        self._placement = placement
        for worker in self._world.workers:
            if worker.alive:
                worker.poll()
