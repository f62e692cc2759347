"""From what was collected, repeat by repeat, to the figures of a result file. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain

from bench.processes import ProcessMemory
from bench.results import BASELINE, LOCAL, PARALLEL, Http, Memory, StartUp, Tax, Throughput, Training
from bench.spread import percentile, ratio, spread
from bench.streams import Streamed
from bench.timing import Prompts, Sample, agreement

Key = tuple[str, int]  # contender, batch
Rate = Callable[[Sample], float]


def prefill_rate(sample: Sample) -> float:
    return sample.prefill_tokens_per_s


def decode_rate(sample: Sample) -> float:
    return sample.decode_tokens_per_s


@dataclass(slots=True)
class Collected:
    """Samples by repeat."""

    samples: dict[Key, dict[int, Sample]] = field(default_factory=dict)
    http: dict[int, dict[int, list[Streamed]]] = field(default_factory=dict)  # streams, repeat
    start_up_s: dict[str, dict[int, float]] = field(default_factory=dict)
    memory: dict[str, list[ProcessMemory]] = field(default_factory=dict)  # of the last repeat
    idle_service_cores: list[float] = field(default_factory=list)
    idle_own_cores: list[float] = field(default_factory=list)
    training: dict[str, dict[int, float]] = field(default_factory=dict)  # contender, repeat: tokens a second
    training_tokens: int = 0  # a step

    def rates(self, key: Key, rate: Rate) -> dict[int, float]:
        return {repeat: rate(sample) for repeat, sample in self.samples.get(key, {}).items()}

    def answers(self, key: Key) -> dict[int, Prompts]:
        return {repeat: sample.answers for repeat, sample in self.samples.get(key, {}).items()}


def throughput(collected: Collected) -> tuple[Throughput, ...]:
    rows: list[Throughput] = []
    for contender, batch in collected.samples:
        key, base = (contender, batch), (BASELINE, batch)
        rows.append(
            Throughput(
                contender=contender,
                batch=batch,
                prefill_tokens_per_s=spread(list(collected.rates(key, prefill_rate).values())),
                decode_tokens_per_s=spread(list(collected.rates(key, decode_rate).values())),
                prefill_ratio=ratio(collected.rates(key, prefill_rate), collected.rates(base, prefill_rate)),
                decode_ratio=ratio(collected.rates(key, decode_rate), collected.rates(base, decode_rate)),
                same_answers=_same_answers(collected, key, base),
            )
        )
    return tuple(rows)


def tax(collected: Collected) -> tuple[Tax, ...]:
    rows: list[Tax] = []
    for batch in dict.fromkeys(batch for _, batch in collected.samples):
        apart, together = (PARALLEL, batch), (LOCAL, batch)
        prefill = ratio(collected.rates(apart, prefill_rate), collected.rates(together, prefill_rate))
        decode = ratio(collected.rates(apart, decode_rate), collected.rates(together, decode_rate))
        if prefill is not None and decode is not None:
            rows.append(Tax(batch=batch, prefill_ratio=prefill, decode_ratio=decode))
    return tuple(rows)


def http(collected: Collected) -> tuple[Http, ...]:
    rows: list[Http] = []
    for streams, repeats in collected.http.items():
        every = [streamed.latencies for streamed in chain.from_iterable(repeats.values())]
        first_ms = [1000 * value for latencies in every for value in latencies.first_token_s]
        between_ms = [1000 * value for latencies in every for value in latencies.between_tokens_s]
        rates = {
            repeat: percentile([streamed.sample.decode_tokens_per_s for streamed in rounds], 50)
            for repeat, rounds in repeats.items()
        }
        rows.append(
            Http(
                streams=streams,
                first_token_p50_ms=percentile(first_ms, 50),
                first_token_p99_ms=percentile(first_ms, 99),
                between_tokens_p50_ms=percentile(between_ms, 50),
                between_tokens_p99_ms=percentile(between_ms, 99),
                first_tokens=len(first_ms),
                gaps=len(between_ms),
                decode_tokens_per_s=spread(list(rates.values())),
                decode_ratio_to_door=ratio(rates, collected.rates((PARALLEL, streams), decode_rate)),
            )
        )
    return tuple(rows)


def start_up(collected: Collected) -> tuple[StartUp, ...]:
    return tuple(
        StartUp(contender=contender, first_token_s=spread(list(repeats.values())))
        for contender, repeats in collected.start_up_s.items()
    )


def training(collected: Collected) -> tuple[Training, ...]:
    base = collected.training.get(BASELINE, {})
    return tuple(
        Training(
            contender=contender,
            tokens_per_step=collected.training_tokens,
            tokens_per_s=spread(list(rates.values())),
            ratio=ratio(rates, base),
        )
        for contender, rates in collected.training.items()
    )


def memory(collected: Collected) -> tuple[Memory, ...]:
    return tuple(chain.from_iterable(_roles(name, found) for name, found in collected.memory.items()))


def _roles(contender: str, found: Iterable[ProcessMemory]) -> list[Memory]:
    by_role: dict[str, list[ProcessMemory]] = {}
    for process in found:
        by_role.setdefault(process.role, []).append(process)
    return [
        Memory(
            contender=contender,
            role=role,
            processes=len(processes),
            largest_peak_bytes=max(process.peak_bytes for process in processes),
            share_bytes=sum(process.share_bytes for process in processes),
        )
        for role, processes in by_role.items()
    ]


def _same_answers(collected: Collected, key: Key, base: Key) -> float | None:
    answers, others = collected.answers(key), collected.answers(base)
    shared = sorted(answers.keys() & others.keys())
    if not shared:
        return None
    return sum(agreement(answers[repeat], others[repeat]) for repeat in shared) / len(shared)
