"""What a run found, as it lies in its JSON file. Units are in the names."""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bench.errors import BenchError
from bench.machine import Machine, Software
from bench.spread import Spread
from bench.waiting import Waiting

BASELINE = "transformers"
LOCAL = "shoal-local"
PARALLEL = "shoal-2"
"""The service that the expert-parallel tax and HTTP are measured on."""
Phase = Literal["prefill", "decode"]
FORMAT = 1
Document = TypeVar("Document", bound=BaseModel)


class Model(BaseModel):
    """Base of everything here."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Throughput(Model):
    """One contender at one batch size; ratios are formed repeat by repeat."""

    contender: str
    batch: int
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    prefill_ratio: Spread | None  # to transformers in the same repeat; None without it
    decode_ratio: Spread | None
    same_answers: float | None  # share of sequences, 0 to 1, with exactly transformers' tokens


class Tax(Model):
    """shoal-2 over shoal-local at one batch size: what separate expert processes cost."""

    batch: int
    prefill_ratio: Spread
    decode_ratio: Spread


class Http(Model):
    """Streams through HTTP, all begun at once; percentiles over all streams of all repeats."""

    streams: int
    first_token_p50_ms: float
    first_token_p99_ms: float
    between_tokens_p50_ms: float
    between_tokens_p99_ms: float
    first_tokens: int  # measured
    gaps: int  # between tokens, measured
    decode_tokens_per_s: Spread
    decode_ratio_to_door: Spread | None  # to the worker's own gRPC door in the same repeat


class StartUp(Model):
    """From the command to the first token, files in the page cache."""

    contender: str
    first_token_s: Spread


class RoundTrip(Model):
    """Of one dispatch between two processes, through the client's transport."""

    transport: str
    payload_bytes: int  # each way
    rounds: int
    p50_us: float
    p99_us: float
    idle_cores: float | None = None  # that both processes use together while nothing is sent
    lost_ms: float | None = None  # from the host's death to the error of who waits for it, once


class Traffic(Model):
    """Payload between the attention side and its hosts, for each token and MoE layer."""

    hosts: int
    bytes_sent_per_token_per_layer: float
    bytes_received_per_token_per_layer: float
    rows_sent_per_token_per_layer: float


class Training(Model):
    """Full fine-tuning with AdamW; the median step of each repeat, the first one left out."""

    contender: str
    tokens_per_step: int
    tokens_per_s: Spread
    ratio: Spread | None  # to transformers in the same repeat; None without it


class Memory(Model):
    """Processes of one role of one contender: the largest peak, and the sum of shares."""

    contender: str
    role: str
    processes: int
    largest_peak_bytes: int  # resident, mapped files included
    share_bytes: int  # proportional set size, summed over the processes


class Implementation(Model):
    """transformers' fastest at one batch size, by its own names."""

    batch: int
    prefill_attention: str
    prefill_experts: str
    decode_attention: str
    decode_experts: str


class Ceiling(Model):
    """What no engine's prefill in fp32 can pass on this machine: products with weights, and nothing else."""

    product_gflops: float  # of a large product, at its fastest
    token_gflop: float  # that one token of a prompt takes

    @property
    def tokens_per_s(self) -> float:
        return self.product_gflops / self.token_gflop


class BaselineSettings(Model):
    """How transformers ran: the fastest of everything that was tried."""

    waiting: Waiting  # of idle OpenMP threads
    implementations: tuple[Implementation, ...]


class Run(Model):
    """The run itself."""

    started: str  # ISO 8601, UTC
    duration_s: float
    command: str
    quick: bool
    seed: int
    repeats: int
    threads: int  # of transformers and of shoal-local
    service_threads: int | None  # of each actor; None: the service's own default
    prompt_tokens: int
    decode_tokens: int
    checkpoint: str  # its directory's name
    parameters: int
    machine: Machine
    software: Software
    paused_cpu_s: float  # processor time that waiting contenders used, over the whole run
    idle_service_cores: float | None  # that shoal-2 uses while it has nothing to do
    idle_own_cores: float | None = None  # of them without Ray's and Serve's own processes


class Results(Model):
    """Everything."""

    format: int
    run: Run
    baseline: BaselineSettings | None
    throughput: tuple[Throughput, ...]
    tax: tuple[Tax, ...]
    http: tuple[Http, ...]
    start_up: tuple[StartUp, ...]
    round_trips: tuple[RoundTrip, ...]
    round_trips_missing: str | None  # why there are none
    traffic: tuple[Traffic, ...]
    memory: tuple[Memory, ...]
    training: tuple[Training, ...] = ()
    ceiling: Ceiling | None = None

    def find(self, contender: str, batch: int) -> Throughput | None:
        return next((row for row in self.throughput if (row.contender, row.batch) == (contender, batch)), None)

    @property
    def contenders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.contender for row in self.throughput))

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(sorted({row.batch for row in self.throughput}))


def write_results(results: BaseModel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> Results:
    """Raises BenchError when the file is missing or not one of these."""
    return read_document(Results, path, "python -m bench")


def read_document(kind: type[Document], path: Path, command: str) -> Document:
    """What `write_results` wrote; raises BenchError, naming the `command` that makes one, when it is none of a kind."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path} cannot be read ({error.strerror}): `{command}` writes it") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
        raise BenchError(f"{path} is not a result file of this version: {where}") from error
