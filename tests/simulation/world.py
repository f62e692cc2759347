"""One seed's world: its clock and its chances, its processes, and what holds them together."""

import random
from collections.abc import Callable, Mapping, Sequence

from attention.engine import EngineLimits
from cluster.events import Event
from cluster.saved import Committed
from router.holding import Holding
from router.placement import Host, initial_placement
from tests.simulation.clock import Clock, Violation
from tests.simulation.hosts import HostProcess
from tests.simulation.invariants import Watch
from tests.simulation.network import Weather
from tests.simulation.reference import LONGEST, Reference
from tests.simulation.shell import Shell
from tests.simulation.workers import Ingress, Worker, engine_limits

PATIENT_S = 300.0  # a client's deadline that no ordinary fault outlasts
READY_WITHIN_S = 30.0


class World:
    """Everything there is. Made of a seed alone, so that a seed replays exactly."""

    def __init__(self, seed: int, references: Sequence[Reference], deadline_s: float | None = None) -> None:
        """`deadline_s`: of the clients of the hosts; requests may fail then."""
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.trace: list[tuple[object, ...]] = []
        self.reference = references[seed % len(references)]
        self.deadline_s = PATIENT_S if deadline_s is None else deadline_s
        self.weather = Weather()
        self.processes: list[HostProcess] = []
        self.workers: list[Worker] = []
        self.start_failures = self.load_failures = 0  # still to come
        self.pairs_slow = 1.0
        self.on_action: Callable[[HostProcess | None], None] = lambda process: None  # before one is carried out
        self.on_change_over: Callable[[], None] = lambda: None
        self._lives: dict[tuple[str, int], HostProcess] = {}
        self._worker_numbers = 0
        self._one_address = self.chance(0.5)  # whether all lives of a host have the same
        self._pair_s = self.between(0.005, 0.03)
        self._step_s = self.between(0.03, 0.12)
        self._limits = engine_limits(
            blocks=self.rng.randint(-(-LONGEST // 4), 14),
            step_tokens=self.rng.randint(5, 24),
            running=self.rng.randint(2, 6),
        )
        shape = self.reference.shape
        hosts = self.rng.randint(1, 4)
        replicas = self.rng.randint(1, min(3, hosts))
        ids = tuple(f"host-{number}" for number in range(hosts))
        owners = initial_placement(self.reference.checkpoint.config, [Host(i, 1, "") for i in ids], replicas).owners
        self.max_pairs = len(shape.moe_layers) * shape.experts if self.chance(0.3) else None
        self._loads = self._draw_loads()
        self.halve_from = 2 if seed // 2 % 2 else None  # by turns for each reference
        self.watch = Watch(self, may_fail=deadline_s is not None)
        self.ingress = Ingress(self)
        self.shell = Shell(self, Committed(Holding.from_owners(owners, ids), ids, replicas, extra=0))
        for _ in range(self.rng.randint(1, 2)):
            self.add_worker()

    def run_until_ready(self) -> None:
        """Until some worker can serve."""
        self.clock.run_until(READY_WITHIN_S, lambda: any(worker.placements.epoch for worker in self.workers))
        if not any(worker.placements.epoch for worker in self.workers):
            raise Violation("the service did not become ready")

    def ask_over(self, seconds: float) -> None:
        """Some requests, at any time within so many seconds."""
        for _ in range(self.rng.randint(3, 6)):
            self.clock.after(self.between(0.0, seconds), self.ask)

    def ask(self) -> None:
        """One request more."""
        index = self.rng.randrange(len(self.reference.requests))
        request = self.reference.numbered(index, len(self.ingress.clients))
        self.ingress.ask(request, self.reference.answers[index])

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability

    def note(self, *what: object) -> None:
        """A line of the trace."""
        self.trace.append((self.clock.now_s, *map(str, what)))

    def event(self, event: Event) -> None:
        self.note("event", event.kind, *event.fields.values())
        if event.kind in ("change_done", "change_rolled_back"):
            self.on_change_over()

    def loads(self, now_s: float) -> Mapping[int, Sequence[float]]:
        return self._loads

    def shift_loads(self) -> None:
        """Other experts are busy from now on."""
        self._loads = self._draw_loads()

    def engine_limits(self) -> EngineLimits:
        return self._limits

    def step_s(self) -> float:
        """Between two steps of a worker."""
        return self._step_s * self.between(0.5, 1.5)

    def pair_s(self) -> float:
        """To load one pair."""
        return self._pair_s * self.pairs_slow * self.between(0.5, 1.5)

    def take_start_failure(self) -> bool:
        """Whether a life that starts now cannot load."""
        fails = self.start_failures > 0
        self.start_failures -= fails
        return fails

    def take_load_failure(self) -> bool:
        """Whether a load that begins now will fail."""
        fails = self.load_failures > 0
        self.load_failures -= fails
        return fails

    def find(self, host_id: str, generation: int) -> HostProcess | None:
        return self._lives.get((host_id, generation))

    def address_of(self, host_id: str, generation: int) -> str:
        return host_id if self._one_address else f"{host_id}:{generation}"

    def listening(self, address: str) -> HostProcess | None:
        """Who takes requests at an address: of several lives the last."""
        for process in reversed(self.processes):
            if process.alive and process.ready and not process.closing and process.name.address == address:
                return process
        return None

    def start_process(self, host_id: str, generation: int) -> HostProcess:
        self.note("start", host_id, generation)
        self.watch.started(host_id, generation)
        process = self._lives[host_id, generation] = HostProcess(self, host_id, generation)
        self.processes.append(process)
        return process

    def host_ended(self, process: HostProcess) -> None:
        """A process is gone: those that are connected to it will notice."""
        for worker in self.workers:
            worker.wire.host_gone(process.name)
        self.shell.host_ended(process)

    def add_worker(self) -> None:
        self._worker_numbers += 1
        self.note("worker", self._worker_numbers)
        self.workers.append(Worker(self, f"worker-{self._worker_numbers}"))

    def _draw_loads(self) -> dict[int, list[float]]:
        shape = self.reference.shape
        return {layer: [self.rng.random() ** 2 for _ in range(shape.experts)] for layer in shape.moe_layers}
