"""What runs on a GPU found, as it lies in a JSON file. Units are in the names."""

from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError
from bench.machine import Machine, Software
from bench.results import Model, read_document
from bench.spread import Spread

FORMAT = 1


class Device(Model):
    """What computed, and with what."""

    name: str
    memory_bytes: int | None  # None: not known, on a CPU
    cuda: str | None  # version that torch was built for
    triton: str | None


class Ceilings(Model):
    """The fastest that the device copies and multiplies; over repeats of either."""

    copy_bytes: int  # of what was copied
    copy_bytes_per_s: Spread  # read and written
    side: int  # of the square matrices
    product_flops_per_s: Spread


class GpuThroughput(Model):
    """One contender with `batch` prompts of `prompt_tokens`; shares are of the medians, 0 to 1."""

    contender: str
    batch: int
    prompt_tokens: int
    decode_tokens: int  # of each sequence
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread  # over all sequences
    token_flops: float  # that a prompt's token takes at least
    step_bytes: float  # that a decode step reads at least
    prefill_share: float  # of the product's FLOP/s
    decode_share: float  # of the copy's bytes a second
    how: str | None = None  # what the contender chose to be fastest


class GpuRun(Model):
    """One process on one device."""

    started: str  # ISO 8601, UTC
    duration_s: float
    command: str
    seed: int
    repeats: int
    size: str  # of the model
    layers: int
    parameters: int
    machine: Machine
    software: Software
    device: Device
    ceilings: Ceilings
    rows: tuple[GpuThroughput, ...] = ()
    failures: tuple[str, ...] = ()  # what was not measured, and why


class GpuResults(Model):
    """Every run of a table."""

    format: int = FORMAT
    runs: tuple[GpuRun, ...]


def merge(results: Sequence[GpuResults]) -> GpuResults:
    """The runs of all; raises BenchError when they can't stand in one table."""
    runs = tuple(run for each in results for run in each.runs)
    kinds = {(run.device.name, run.size, run.layers) for run in runs}
    if len(kinds) > 1:
        told = "; ".join(f"{size}, {layers} layers, on {device}" for device, size, layers in sorted(kinds))
        raise BenchError(f"the runs are of different things ({told}): merge those of one device and one model")
    keys = [(row.contender, row.batch, row.prompt_tokens) for run in runs for row in run.rows]
    for contender, batch, prompt_tokens in keys:
        if keys.count((contender, batch, prompt_tokens)) > 1:
            raise BenchError(
                f"{contender} with {batch} prompts of {prompt_tokens} tokens was measured twice: "
                "leave one file out, or measure with another --name"
            )
    return GpuResults(runs=runs)


def read_results(path: Path) -> GpuResults:
    """Raises BenchError when the file is missing or not one of these."""
    return read_document(GpuResults, path, "python -m bench.gpu")
