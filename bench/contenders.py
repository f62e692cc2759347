"""What takes part: each in processes of its own, and only one of them awake at a time.

transformers and shoal-local stay loaded and are paused between turns. A service is started for its turn and ended
after it, because an idle Ray is not quite idle; that also measures its start-up once a repeat.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from bench.options import Options, service_hosts
from bench.processes import ProcessMemory, cpu_s, memory
from bench.prompts import draw_workload
from bench.results import BASELINE, BaselineSettings, Implementation
from bench.service import Service, running_service
from bench.streams import measure_door
from bench.timing import Sample, Workload
from bench.transformers_worker import Tuned
from bench.waiting import WAITING, Waiting, waiting_environment
from bench.worker import WorkerProcess
from cluster.threads import thread_environment

Say = Callable[[str], None]
TUNING_DECODE_TOKENS = 4
_SAMPLE = TypeAdapter(Sample)
_TUNED = TypeAdapter(list[Tuned])


@dataclass(frozen=True, slots=True)
class Turn:
    """A contender that is awake."""

    measure: Callable[[Workload], Sample]
    memory: Callable[[], list[ProcessMemory]]
    service: Service | None = None


@dataclass(slots=True)
class Resident:
    """A process that stays loaded; outside its turns it is stopped, and cannot compute."""

    name: str
    worker: WorkerProcess
    paused_cpu_s: float = 0.0
    _cpu_at_pause_s: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        self._pause()

    @contextlib.contextmanager
    def turn(self) -> Iterator[Turn]:
        self.paused_cpu_s += cpu_s(self.worker.pid) - self._cpu_at_pause_s
        self.worker.resume()
        try:
            yield Turn(lambda workload: self.worker.ask("measure", workload, _SAMPLE), self._memory)
        finally:
            self._pause()

    def _memory(self) -> list[ProcessMemory]:
        found = memory(self.worker.pid, "the one process")
        return [found] if found is not None else []

    def _pause(self) -> None:
        self.worker.pause()
        self._cpu_at_pause_s = cpu_s(self.worker.pid)


@dataclass(frozen=True, slots=True)
class Served:
    """`shoal serve` with one attention worker and so many expert actors, started anew for each turn."""

    name: str
    checkpoint: Path
    hosts: int
    threads: int | None
    runner: asyncio.Runner

    @contextlib.contextmanager
    def turn(self) -> Iterator[Turn]:
        with running_service(self.checkpoint, self.hosts, self.threads) as service:
            yield Turn(lambda workload: measure_door(self.runner, service.door, workload), service.memory, service)


Contender = Resident | Served


@dataclass(frozen=True, slots=True)
class Lineup:
    """Everybody who takes part."""

    contenders: tuple[Contender, ...]
    baseline: BaselineSettings | None

    def find(self, name: str) -> Contender | None:
        return next((contender for contender in self.contenders if contender.name == name), None)

    @property
    def paused_cpu_s(self) -> float:
        return sum(contender.paused_cpu_s for contender in self.contenders if isinstance(contender, Resident))


@contextlib.contextmanager
def lined_up(options: Options, vocabulary: int, runner: asyncio.Runner, say: Say) -> Iterator[Lineup]:
    """Load what stays loaded; ends it with the block."""
    with contextlib.ExitStack() as stack:
        contenders: list[Contender] = []
        baseline: BaselineSettings | None = None
        for name in options.contenders:
            hosts = service_hosts(name)
            if hosts is not None:
                contenders.append(Served(name, options.checkpoint, hosts, options.service_threads, runner))
            elif name == BASELINE:
                say("transformers: trying its implementations")
                resident, baseline = _tuned_transformers(options, vocabulary, stack)
                contenders.append(resident)
            else:
                say(f"{name}: loading")
                contenders.append(Resident(name, stack.enter_context(_local(options))))
        yield Lineup(tuple(contenders), baseline)


@contextlib.contextmanager
def _process(module: str, options: Options, environment: dict[str, str]) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(module, [str(options.checkpoint), str(options.threads)], environment)
    try:
        yield worker
    finally:
        worker.stop()


def _local(options: Options) -> AbstractContextManager[WorkerProcess]:
    return _process("bench.local_worker", options, thread_environment(options.threads))


def _tuned_transformers(
    options: Options, vocabulary: int, stack: contextlib.ExitStack
) -> tuple[Resident, BaselineSettings]:
    """Tune with threads that spin and with threads that sleep while they wait; keep the faster process."""
    workloads = [
        draw_workload(f"tune-{batch}", batch, options.prompt_tokens, vocabulary, TUNING_DECODE_TOKENS)
        for batch in options.batches
    ]
    tried: dict[Waiting, list[Tuned]] = {}
    for waiting in WAITING:
        with _process("bench.transformers_worker", options, waiting_environment(waiting, options.threads)) as worker:
            tried[waiting] = worker.ask("tune", workloads, _TUNED)
    best = min(tried, key=lambda waiting: _cost_s(tried[waiting], options.decode_tokens))
    worker = stack.enter_context(
        _process("bench.transformers_worker", options, waiting_environment(best, options.threads))
    )
    worker.ask("use", tried[best], _TUNED)
    implementations = tuple(
        Implementation(
            batch=tuned.batch,
            prefill_attention=tuned.prefill.attention,
            prefill_experts=tuned.prefill.experts,
            decode_attention=tuned.decode.attention,
            decode_experts=tuned.decode.experts,
        )
        for tuned in tried[best]
    )
    return Resident(BASELINE, worker), BaselineSettings(waiting=best, implementations=implementations)


def _cost_s(tuned: list[Tuned], decode_tokens: int) -> float:
    """Seconds for one measurement of every batch size."""
    return sum(batch.prefill_s + decode_tokens * batch.decode_step_s for batch in tuned)
