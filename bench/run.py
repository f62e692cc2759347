"""One run: everybody in turn, repeat by repeat, and the results of it."""

import asyncio
import datetime
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter

from bench import summary
from bench.ceiling import measure_ceiling
from bench.contenders import Lineup, Resident, Turn, lined_up
from bench.errors import BenchError
from bench.local_worker import MOST_HOSTS, TrafficCommand
from bench.machine import read_machine, read_software
from bench.options import Options
from bench.processes import RAYS
from bench.prompts import draw_workload
from bench.results import BASELINE, FORMAT, LOCAL, PARALLEL, Results, Run, Traffic
from bench.round_trips import measure_round_trips
from bench.service import Service
from bench.streams import Streamed, measure_http
from bench.summary import Collected
from bench.timing import Workload
from bench.training import measure_training
from kernels.threads import set_threads
from model.checkpoint import Checkpoint

Say = Callable[[str], None]
WARM_UP_TOKENS = 2
TRAFFIC_HOSTS = (1, 2, 4, 8)
TRAFFIC_BATCH = 2
LATENCY_STREAMS = 8  # fewer streams at once are repeated, so that percentiles have something to stand on
IDLE_S = 5.0
READ_BYTES = 16 * 1024 * 1024


def measure(options: Options, command: str, say: Say) -> Results:
    """Raises BenchError, or ValueError (ConfigError, CheckpointError) for an unusable checkpoint."""
    started, started_s = datetime.datetime.now(datetime.UTC), time.monotonic()
    software = read_software()  # what is measured: the checkout may be another one at the end
    if BASELINE in options.contenders and importlib.util.find_spec("transformers") is None:
        raise BenchError("transformers is not installed: pip install transformers, or name other --contenders")
    if PARALLEL in options.contenders and importlib.util.find_spec("aiohttp") is None:
        raise BenchError("aiohttp, which asks through HTTP, is not installed: pip install aiohttp, or `make env`")
    checkpoint = Checkpoint.open(options.checkpoint)
    _check_length(options, checkpoint.config.max_position_embeddings)
    _warm_page_cache(options.checkpoint)
    set_threads(options.threads)
    ceiling = measure_ceiling(checkpoint.config)
    say("dispatch round trips")
    round_trips, round_trips_missing = measure_round_trips(options.quick)
    collected = Collected()
    vocabulary = checkpoint.config.vocab_size
    with asyncio.Runner() as runner, lined_up(options, vocabulary, runner, say) as lineup:
        bench = _Repeats(options, vocabulary, collected, runner, say)
        say("traffic")
        traffic = _traffic(lineup, bench.workload("traffic", TRAFFIC_BATCH), checkpoint.config.n_routed_experts)
        for repeat in range(options.repeats):
            bench.repeat(lineup, repeat)
        paused_cpu_s = lineup.paused_cpu_s
    if options.training:
        measure_training(options, vocabulary, collected, say)
    idle, own = collected.idle_service_cores, collected.idle_own_cores
    return Results(
        format=FORMAT,
        run=Run(
            started=started.isoformat(timespec="seconds"),
            duration_s=time.monotonic() - started_s,
            command=command,
            quick=options.quick,
            seed=options.seed,
            repeats=options.repeats,
            threads=options.threads,
            service_threads=options.service_threads,
            prompt_tokens=options.prompt_tokens,
            decode_tokens=options.decode_tokens,
            checkpoint=options.checkpoint.resolve().name,
            parameters=_parameters(checkpoint),
            machine=read_machine(),
            software=software,
            paused_cpu_s=paused_cpu_s,
            idle_service_cores=sum(idle) / len(idle) if idle else None,
            idle_own_cores=sum(own) / len(own) if own else None,
        ),
        baseline=lineup.baseline,
        throughput=summary.throughput(collected),
        tax=summary.tax(collected),
        http=summary.http(collected),
        start_up=summary.start_up(collected),
        round_trips=round_trips,
        round_trips_missing=round_trips_missing,
        traffic=traffic,
        memory=summary.memory(collected),
        training=summary.training(collected),
        ceiling=ceiling,
    )


class _Repeats:
    """Turns in a cycle that begins with another contender each time, so that no place in it is anybody's."""

    def __init__(
        self, options: Options, vocabulary: int, collected: Collected, runner: asyncio.Runner, say: Say
    ) -> None:
        self._options = options
        self._vocabulary = vocabulary
        self._collected = collected
        self._runner = runner
        self._say = say
        self._warm: set[str] = set()

    def workload(self, purpose: str, batch: int, decode_tokens: int | None = None) -> Workload:
        """Prompts for one purpose: everybody who measures for it gets the same ones."""
        options = self._options
        count = options.decode_tokens if decode_tokens is None else decode_tokens
        return draw_workload(f"{options.seed}-{purpose}-{batch}", batch, options.prompt_tokens, self._vocabulary, count)

    def repeat(self, lineup: Lineup, repeat: int) -> None:
        first = repeat % len(lineup.contenders)
        for contender in (*lineup.contenders[first:], *lineup.contenders[:first]):
            with contender.turn() as turn:
                self._turn(contender.name, turn, repeat)

    def _turn(self, name: str, turn: Turn, repeat: int) -> None:
        if turn.service is not None:
            self._collected.start_up_s.setdefault(name, {})[repeat] = turn.service.start_up_s
        self._warm_up(name, turn, repeat)
        by_http = turn.service if name == PARALLEL else None
        if by_http is not None and repeat % 2:  # first and second in turn, as what is asked later finds all warmer
            self._http(by_http, repeat)
        for batch in self._options.batches:
            sample = turn.measure(self.workload(f"repeat-{repeat}", batch))
            self._collected.samples.setdefault((name, batch), {})[repeat] = sample
            self._say(
                f"repeat {repeat + 1}/{self._options.repeats}  {name}  B={batch}  "
                f"prefill {sample.prefill_tokens_per_s:.0f}  decode {sample.decode_tokens_per_s:.1f} tokens/s"
            )
        if by_http is not None:
            if not repeat % 2:
                self._http(by_http, repeat)
            self._idle(by_http)
        self._collected.memory[name] = turn.memory()

    def _warm_up(self, name: str, turn: Turn, repeat: int) -> None:
        """Every size once in a new process; a short one in a process that was paused."""
        fresh = turn.service is not None or name not in self._warm
        self._warm.add(name)
        for batch in self._options.batches if fresh else self._options.batches[:1]:
            turn.measure(self.workload(f"warm-up-{repeat}", batch, WARM_UP_TOKENS))

    def _http(self, service: Service, repeat: int) -> None:
        def ask(workload: Workload) -> Streamed:
            return measure_http(self._runner, service.url, service.model, workload)

        ask(self.workload(f"http-warm-up-{repeat}", 1, WARM_UP_TOKENS))
        for streams in self._options.batches:
            rounds = [
                ask(self.workload(f"http-{repeat}-{number}", streams))
                for number in range(max(1, LATENCY_STREAMS // (2 * streams)))
            ]
            self._collected.http.setdefault(streams, {})[repeat] = rounds
            rate = rounds[0].sample.decode_tokens_per_s
            self._say(
                f"repeat {repeat + 1}/{self._options.repeats}  HTTP  {streams} streams  decode {rate:.1f} tokens/s"
            )

    def _idle(self, service: Service) -> None:
        before_s = service.cpu_s()
        time.sleep(IDLE_S)
        used_s = {role: (after_s - before_s.get(role, 0.0)) / IDLE_S for role, after_s in service.cpu_s().items()}
        self._collected.idle_service_cores.append(sum(used_s.values()))
        self._collected.idle_own_cores.append(sum(cores for role, cores in used_s.items() if role not in RAYS))


def _traffic(lineup: Lineup, workload: Workload, experts: int) -> tuple[Traffic, ...]:
    """What the client counts with the experts split over so many hosts; none without shoal-local."""
    local = lineup.find(LOCAL)
    if not isinstance(local, Resident):
        return ()
    counts = [hosts for hosts in TRAFFIC_HOSTS if hosts <= min(experts, MOST_HOSTS)]
    with local.turn():
        answer = TypeAdapter(Traffic)
        return tuple(local.worker.ask("traffic", TrafficCommand(workload, hosts), answer) for hosts in counts)


def _check_length(options: Options, longest: int) -> None:
    prompts = ((0,) * options.prompt_tokens,) * max(options.batches)
    needed = options.prompt_tokens + Workload(prompts, options.decode_tokens).most_tokens
    if needed > longest:
        raise BenchError(f"the model's context is {longest} tokens; these batch sizes need {needed}: use smaller ones")


def _warm_page_cache(directory: Path) -> None:
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
