"""The controller's body, as cluster/controller.py and cluster/fleet.py are: it carries out, tells, dies and returns."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from cluster.actions import Abandon, Action, GiveUp, Load, Probe, Publish, Retire, Save, StartHost, StopHost
from cluster.change import Change, ChangeRefused, Deadlines, Wish
from cluster.conductor import Conductor
from cluster.events import EventLog
from cluster.saved import Committed, SavedState
from router.holding import Pair
from router.placement import Placement
from tests.simulation.clock import Violation
from tests.simulation.hosts import HostProcess

if TYPE_CHECKING:
    from tests.simulation.workers import Worker
    from tests.simulation.world import World

TICK_S = 0.25
SILENT_S = 3.0
PROBE_TIMEOUT_S = 1.0
ADOPT_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 2.0
DEADLINES = Deadlines(plan_s=6.0, prepare_s=4.0, retire_s=3.0)
Tell = Callable[[Conductor], None]


class Shell:
    """At most one conductor at a time. A session is the time between two crashes."""

    def __init__(self, world: "World", initial: Committed) -> None:
        self._world = world
        self._initial = initial
        self._kept: str | None = None  # what a crash does not take
        self._session = 0
        self._lives: dict[tuple[str, int], HostProcess] = {}
        self._seen: dict[str, float] = {}  # workers
        self._placement: Placement | None = None
        self._crash_after: int | None = None  # actions
        self._acting = False
        self.conductor: Conductor | None = None
        self.adopted = False
        self._boot()

    @property
    def up(self) -> bool:
        return self.conductor is not None and self.adopted

    @property
    def crashed(self) -> bool:
        """Whether there was an earlier conductor than this."""
        return self._session > 0

    def crash(self, after_actions: int | None = None) -> None:
        """Now, or before one of the next actions is carried out."""
        if after_actions is not None:
            self._crash_after = after_actions
            return
        self._crash_after = None
        if self.conductor is None:
            return
        self._world.note("controller_crashed")
        self.conductor, self._placement, self.adopted = None, None, False
        self._session += 1
        self._lives.clear()
        self._seen.clear()
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
            if refused.busy != (running is not None):
                raise Violation(f"{wish} was refused with busy={refused.busy}, while {running} is under way") from None
            return None
        if running is not None:
            raise Violation(f"{wish} was begun while {running.id} is under way")
        self._world.note("wish", wish.kind, wish.hosts, wish.leaving, wish.replicas)
        self._act()
        return change

    def wants(self, host_id: str, generation: int) -> bool:
        """Whether a life should go on."""
        return self.conductor is None or not self.adopted or self.conductor.wants(host_id, generation)

    def tell_from(self, worker: "Worker", tell: Callable[["Shell"], None]) -> None:
        """A message of a worker, which comes if there is a way, and somebody to hear it."""
        world = self._world

        def arrive() -> None:
            if self.conductor is not None and worker.cut_until_s <= world.clock.now_s:
                tell(self)

        if worker.cut_until_s <= world.clock.now_s:
            world.clock.after(world.between(0.002, 0.05), arrive)

    def heartbeat(self, worker: "Worker", epoch: int) -> None:
        assert self.conductor is not None
        if worker.alive:
            worker.heard = True
        self._seen[worker.id] = self._world.clock.now_s
        self._world.watch.returned(worker.id)
        self.conductor.worker_at(worker.id, epoch)
        self._act()

    def suspected(self, host_id: str, generation: int, reason: str) -> None:
        assert self.conductor is not None
        self.conductor.suspected(host_id, generation, reason, self._world.clock.now_s)
        self._act()

    def placement_for(self, worker: "Worker") -> Placement | None:
        return self._placement if worker.cut_until_s <= self._world.clock.now_s else None

    def host_ended(self, process: HostProcess) -> None:
        """A process died: the cluster tells, a while later, whoever watches then."""
        delay_s = self._world.between(0.02, 0.6)
        self._world.clock.after(delay_s, partial(self._gone, process))

    def _gone(self, process: HostProcess) -> None:
        if self.conductor is not None and self._lives.pop((process.id, process.generation), None) is not None:
            self.conductor.host_died(process.id, process.generation, "its process ended", self._world.clock.now_s)
            self._act()

    def _boot(self) -> None:
        world = self._world
        saved = SavedState.from_json(self._kept) if self._kept is not None else None
        self.conductor = Conductor(
            world.reference.shape, self._initial, world.loads, EventLog(world.event), saved, DEADLINES
        )
        world.note("controller_began", self._session, 0 if saved is None else saved.epoch)
        wait_s = 0.0
        for host_id, generation in (saved.generations if saved is not None else {}).items():
            process = world.find(host_id, generation)
            if process is not None and process.alive:
                wait_s = max(wait_s, self._adopt(process))
        world.clock.after(wait_s + 0.01, partial(self._begin, self._session))

    def _begin(self, session: int) -> None:
        if session == self._session and self.conductor is not None:
            self.adopted = True
            self._tick(session)

    def _adopt(self, process: HostProcess) -> float:
        """Take over what an earlier session started; what does not serve is ended. Seconds that this may take."""
        answered: list[bool] = []
        answer = self._answering(process)

        def settled() -> None:
            report = process.settle()
            if report is not None:
                answer(partial(ready, report))

        def ready(report: object, conductor: Conductor) -> None:
            if not answered:
                answered.append(True)
                self._watch(process)
                conductor.host_ready(report, self._world.clock.now_s)  # type: ignore[arg-type]

        def give_up(session: int) -> None:
            if session == self._session and not answered:
                answered.append(False)
                self._world.note("not_adopted", process)
                self._command(process, process.end, held_up=False)

        self._command(process, settled)
        serves = process.ready and not process.frozen and process.cut_until_s <= self._world.clock.now_s
        timeout_s = 0.15 if serves else ADOPT_TIMEOUT_S
        self._world.clock.after(timeout_s, partial(give_up, self._session))
        return timeout_s

    def _tick(self, session: int) -> None:
        if session == self._session and self.conductor is not None:
            now_s = self._world.clock.now_s
            for worker_id in [worker for worker, seen_s in self._seen.items() if seen_s < now_s - SILENT_S]:
                del self._seen[worker_id]
                self._world.watch.left(worker_id)
                self.conductor.worker_left(worker_id)
            self._world.clock.after(TICK_S, partial(self._tick, session))
            self._act()

    def _act(self) -> None:
        conductor = self.conductor
        if conductor is None or not self.adopted or self._acting:
            return
        self._acting = True
        try:
            self._world.watch.before(conductor)
            actions = conductor.act(self._world.clock.now_s)
            self._world.watch.after(conductor)
            for action in actions:
                if self._crash_after is not None:
                    if self._crash_after == 0:
                        self.crash()
                        return
                    self._crash_after -= 1
                self._carry_out(conductor, action)
        finally:
            self._acting = False

    def _carry_out(self, conductor: Conductor, action: Action) -> None:
        world = self._world
        if isinstance(action, Save):
            self._kept = action.state.to_json()
            world.note("save", action.state.epoch)
        elif isinstance(action, Publish):
            self._publish(action.placement)
        elif isinstance(action, StartHost):
            self._start(action)
        elif isinstance(action, GiveUp):
            raise Violation(f"a service that was ready was given up: {action.reason}")
        else:
            self._ask(conductor, action)

    def _ask(self, conductor: Conductor, action: Load | Abandon | Retire | StopHost | Probe) -> None:
        """What is wanted of one life."""
        world = self._world
        life = self._lives.get((action.host_id, action.generation))
        world.note(type(action).__name__, action.host_id, action.generation)
        world.on_action(world.find(action.host_id, action.generation))
        if isinstance(action, StopHost):
            self._stop(action)
        elif life is None:
            conductor.host_died(action.host_id, action.generation, "it is not there", world.clock.now_s)
        elif isinstance(action, Load):
            self._load(life, action)
        elif isinstance(action, Abandon):
            self._command(life, partial(life.abandon, action.change_id))
        elif isinstance(action, Retire):
            world.watch.retiring(life, action.pairs)
            self._retire(life, action.pairs)
        else:
            self._probe(life)

    def _publish(self, placement: Placement) -> None:
        self._world.watch.published(placement)
        self._placement = placement
        for worker in self._world.workers:
            if worker.alive:
                worker.poll()

    def _start(self, action: StartHost) -> None:
        process = self._world.start_process(action.host_id, action.generation)
        self._watch(process)
        answer = self._answering(process)

        def done(reason: str | None) -> None:
            if reason is None:
                answer(lambda conductor: conductor.host_ready(process.report(), self._world.clock.now_s))
            else:
                answer(partial(failed, reason))

        def failed(reason: str, conductor: Conductor) -> None:
            conductor.host_failed(process.id, process.generation, reason, self._world.clock.now_s)
            process.end()

        process.start(action.pairs, done)

    def _load(self, life: HostProcess, action: Load) -> None:
        answer, now = self._answering(life), self._world.clock.now

        def progress(pairs: int) -> None:
            answer(lambda conductor: conductor.load_progress(action.change_id, life.id, pairs))

        def done(reason: str | None) -> None:
            if reason is None:
                answer(lambda c: c.loaded(action.change_id, life.id, life.generation, action.pairs))
            else:
                answer(lambda c: c.load_failed(action.change_id, life.id, life.generation, reason, now()))

        self._command(life, partial(life.take, action.change_id, action.pairs, action.sources, progress, done))

    def _retire(self, life: HostProcess, pairs: frozenset[Pair]) -> None:
        answer = self._answering(life)

        def done() -> None:
            answer(lambda conductor: conductor.retired(life.id, life.generation, pairs))

        self._command(life, partial(life.drop, pairs, done))

    def _probe(self, life: HostProcess) -> None:
        told: list[bool] = []

        def tell(alive: bool, conductor: Conductor) -> None:
            if not told:
                told.append(alive)
                self._world.note("probed", life, alive)
                conductor.probed(life.id, life.generation, alive, self._world.clock.now_s)

        answer = self._answering(life)
        self._command(life, lambda: answer(partial(tell, True)))
        self._world.clock.after(PROBE_TIMEOUT_S, partial(self._hear, self._session, partial(tell, False)))

    def _stop(self, action: StopHost) -> None:
        process = self._world.find(action.host_id, action.generation)
        if process is None or not process.alive:
            return
        self._world.watch.stopping(process, action.insist)
        if action.insist:
            self._command(process, process.kill, held_up=False)
        elif (process.id, process.generation) not in self._lives:
            self._command(process, process.end, held_up=False)
        else:
            self._command(process, process.close)
            self._world.clock.after(STOP_TIMEOUT_S, partial(self._insist, self._session, process))

    def _insist(self, session: int, process: HostProcess) -> None:
        if session == self._session:
            self._command(process, process.kill, held_up=False)

    def _watch(self, process: HostProcess) -> None:
        self._lives[process.id, process.generation] = process
        if not process.alive:
            self.host_ended(process)

    def _command(self, process: HostProcess, work: Callable[[], None], held_up: bool = True) -> None:
        """To a process; what is not `held_up` is done to it, and not by it."""
        clock = self._world.clock
        cut_s = max(0.0, process.cut_until_s - clock.now_s)
        session = self._session

        def arrive() -> None:
            if held_up and cut_s and session != self._session:
                return  # whoever sent it again and again until it got through is dead
            process.run(work) if held_up else work()

        clock.after(self._world.between(0.001, 0.03) + cut_s, arrive)

    def _answering(self, process: HostProcess) -> Callable[[Tell], None]:
        """The way back from a process to this session, which nobody else takes."""
        clock, session = self._world.clock, self._session

        def answer(tell: Tell) -> None:
            delay_s = self._world.between(0.001, 0.03) + max(0.0, process.cut_until_s - clock.now_s)
            clock.after(delay_s, partial(self._hear, session, tell))

        return answer

    def _hear(self, session: int, tell: Tell) -> None:
        if session == self._session and self.conductor is not None:
            tell(self.conductor)
            self._act()
