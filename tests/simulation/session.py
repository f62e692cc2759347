"""A session of the controller, from boot to crash: what it has host processes do, and how their answers come back."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from cluster.actions import Abandon, Load, Probe, Retire, StartHost, StopHost
from cluster.conductor import Conductor
from router.holding import Pair
from tests.simulation.hosts import HostProcess

if TYPE_CHECKING:
    from tests.simulation.world import World

PROBE_TIMEOUT_S = 1.0
ADOPT_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 2.0
Tell = Callable[[Conductor], None]


class Session:
    """What was asked of a process before the end is still done; nobody hears its answer."""

    def __init__(self, world: "World", conductor: Conductor, act: Callable[[], None]) -> None:
        """`act` is called when an answer came."""
        self._world = world
        self._act = act
        self.conductor = conductor
        self.lives: dict[tuple[str, int], HostProcess] = {}
        self.seen: dict[str, float] = {}  # workers, and when
        self.adopted = False
        self.over = False

    def adopt(self, process: HostProcess) -> float:
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

        def give_up() -> None:
            if not self.over and not answered:
                answered.append(False)
                self._world.note("not_adopted", process)
                self._command(process, process.end, held_up=False)

        self._command(process, settled)
        serves = process.ready and not process.frozen and process.cut_until_s <= self._world.clock.now_s
        timeout_s = 0.15 if serves else ADOPT_TIMEOUT_S
        self._world.clock.after(timeout_s, give_up)
        return timeout_s

    def ask(self, action: Load | Abandon | Retire | StopHost | Probe) -> None:
        """What is wanted of one life."""
        world = self._world
        life = self.lives.get((action.host_id, action.generation))
        world.note(type(action).__name__, action.host_id, action.generation)
        world.on_action(world.find(action.host_id, action.generation))
        if isinstance(action, StopHost):
            self._stop(action)
        elif life is None:
            self.conductor.host_died(action.host_id, action.generation, "it is not there", world.clock.now_s)
        elif isinstance(action, Load):
            self._load(life, action)
        elif isinstance(action, Abandon):
            self._command(life, partial(life.abandon, action.change_id))
        elif isinstance(action, Retire):
            world.watch.retiring(life, action.pairs)
            self._retire(life, action.pairs)
        else:
            self._probe(life)

    def start(self, action: StartHost) -> None:
        process = self._world.start_process(action.host_id, action.generation)
        self._watch(process)
        answer, now = self._answering(process), self._world.clock.now

        def progress(pairs: int) -> None:
            answer(lambda conductor: conductor.host_progress(process.id, process.generation, pairs, now()))

        def done(reason: str | None) -> None:
            if reason is None:
                answer(lambda conductor: conductor.host_ready(process.report(), now()))
            else:
                answer(partial(failed, reason))

        def failed(reason: str, conductor: Conductor) -> None:
            conductor.host_failed(process.id, process.generation, reason, now())
            process.end()

        process.start(action.pairs, progress, done)

    def _load(self, life: HostProcess, action: Load) -> None:
        answer, now = self._answering(life), self._world.clock.now

        def progress(pairs: int) -> None:
            answer(lambda conductor: conductor.load_progress(action.change_id, life.id, pairs, now()))

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
        self._world.clock.after(PROBE_TIMEOUT_S, partial(self._hear, partial(tell, False)))

    def _stop(self, action: StopHost) -> None:
        process = self._world.find(action.host_id, action.generation)
        if process is None or not process.alive:
            return
        self._world.watch.stopping(process, action.insist)
        if action.insist:
            self._command(process, process.kill, held_up=False)
        elif (process.id, process.generation) not in self.lives:
            self._command(process, process.end, held_up=False)
        else:
            self._command(process, process.close)
            self._world.clock.after(STOP_TIMEOUT_S, partial(self._insist, process))

    def _insist(self, process: HostProcess) -> None:
        if not self.over:
            self._command(process, process.kill, held_up=False)

    def _watch(self, process: HostProcess) -> None:
        self.lives[process.id, process.generation] = process
        if not process.alive:
            self._world.shell.host_ended(process)

    def _command(self, process: HostProcess, work: Callable[[], None], held_up: bool = True) -> None:
        """To a process; what is not `held_up` is done to it, and not by it."""
        clock = self._world.clock
        cut_s = max(0.0, process.cut_until_s - clock.now_s)

        def arrive() -> None:
            if held_up and cut_s and self.over:
                return  # whoever sent it again and again until it got through is dead
            process.run(work) if held_up else work()

        clock.after(self._world.between(0.001, 0.03) + cut_s, arrive)

    def _answering(self, process: HostProcess) -> Callable[[Tell], None]:
        """The way back from a process to this session, which nobody else takes."""
        clock = self._world.clock

        def answer(tell: Tell) -> None:
            delay_s = self._world.between(0.001, 0.03) + max(0.0, process.cut_until_s - clock.now_s)
            clock.after(delay_s, partial(self._hear, tell))

        return answer

    def _hear(self, tell: Tell) -> None:
        if not self.over:
            tell(self.conductor)
            self._act()
