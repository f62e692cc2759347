"""One run on one device: its ceilings, then every contender with every workload, kept as they come."""

import contextlib
import gc
import textwrap
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from typing import Protocol

import torch

from bench.errors import BenchError
from bench.gpu_ceilings import measure_ceilings
from bench.gpu_options import Options
from bench.gpu_results import Device, GpuResults, GpuRun, GpuThroughput
from bench.gpu_shoal import GpuShoal, engine_limits
from bench.gpu_transformers import GpuTransformers
from bench.gpu_work import step_bytes, token_flops
from bench.machine import read_machine, read_software
from bench.prompts import draw_workload
from bench.random_checkpoint import RandomCheckpoint, raw_config
from bench.results import BASELINE, write_results
from bench.spread import spread
from bench.timing import Sample, Workload
from model.config import ModelConfig, parse_config
from services.footprint import by_kind

DTYPE = torch.bfloat16
SAID_CHARACTERS = 160  # of what went wrong, in the table's notes
Say = Callable[[str], None]


class Contender(Protocol):
    """What is measured, holding the device's memory for as long as it lives."""

    def prepare(self, workload: Workload) -> None:
        """All that a workload of this shape needs once."""

    def measure(self, workload: Workload) -> Sample:
        """Prefill and decode it."""

    def how(self, workload: Workload) -> str | None:
        """What `prepare` chose for workloads of this shape."""


class GpuBenchmark:
    """One run: its rows so far are in its file."""

    def __init__(self, options: Options, command: str, say: Say) -> None:
        self._options, self._say = options, say
        self._raw = raw_config(options.size, options.layers)
        self.config: ModelConfig = parse_config(self._raw)
        self._started_s = time.monotonic()
        started, software = datetime.now(UTC).isoformat(timespec="seconds"), read_software()
        if options.commit is not None:
            # whoever gives it, where there is no checkout, answers for it
            software = software.model_copy(update={"commit": options.commit, "uncommitted_changes": False})
        device = read_device(options.device)
        say(f"{device.name}: a copy of {options.copy_bytes >> 20} MiB, a product of side {options.side}")
        self.run = GpuRun(
            started=started,
            duration_s=0.0,
            command=command,
            seed=options.seed,
            repeats=options.repeats,
            size=options.size,
            layers=self.config.num_hidden_layers,
            parameters=by_kind(self.config).total(),
            machine=read_machine(),
            software=software,
            device=device,
            ceilings=measure_ceilings(options.device, options.copy_bytes, options.side),
        )

    def measure(self) -> GpuRun:
        """Every contender, one after the other; one that fails does not end the others."""
        options = self._options
        limits = engine_limits(options.workloads, options.decode_tokens)
        checkpoint = RandomCheckpoint(self.config, options.device, DTYPE, options.seed)
        self._contend(options.name, lambda: GpuShoal(checkpoint, limits))
        if options.transformers:
            self._contend(BASELINE, lambda: GpuTransformers(self._raw, options.device, DTYPE, options.seed))
        return self.run

    def _contend(self, name: str, make: Callable[[], Contender]) -> None:
        self._say(f"{name}: making its weights")
        place = "its weights"
        try:
            free(self._options.device)
            contender = make()
            for batch, prompt_tokens in self._options.workloads:
                place = f"{batch} x {prompt_tokens}"
                if self._late:
                    raise BenchError(f"{self._options.limit_s:.0f} s were over before")
                row = self._row(name, contender, batch, prompt_tokens)
                self._keep(rows=(*self.run.rows, row))
                prefill, decode = row.prefill_tokens_per_s.median, row.decode_tokens_per_s.median
                self._say(f"{name}, {place}: prefill {prefill:.0f} tokens/s, decode {decode:.0f} tokens/s")
        except Exception as error:  # noqa: BLE001  whatever it is, it is told, and what was measured stays
            if not isinstance(error, BenchError):
                traceback.print_exc()
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            said = textwrap.shorten(first, SAID_CHARACTERS)
            self._say(f"{name}, {place}: {said}")
            self._keep(failures=(*self.run.failures, f"{name} from {place} on: {said}"))

    def _row(self, name: str, contender: Contender, batch: int, prompt_tokens: int) -> GpuThroughput:
        decode_tokens, run, config = self._options.decode_tokens, self.run, self.config

        def draw(repeat: str) -> Workload:
            key = f"gpu {run.seed} {batch} {prompt_tokens} {repeat}"
            return draw_workload(key, batch, prompt_tokens, config.vocab_size, decode_tokens)

        first = draw("prepare")
        contender.prepare(first)
        samples = [contender.measure(draw(str(repeat))) for repeat in range(run.repeats)]
        prefill = spread([sample.prefill_tokens_per_s for sample in samples])
        decode = spread([sample.decode_tokens_per_s for sample in samples])
        flops = token_flops(config, prompt_tokens)
        # the lengths that sequences have at least, halfway: the earliest have longer answers by then
        read_bytes = step_bytes(config, batch, prompt_tokens + decode_tokens // 2)
        return GpuThroughput(
            contender=name,
            batch=batch,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            prefill_tokens_per_s=prefill,
            decode_tokens_per_s=decode,
            token_flops=flops,
            step_bytes=read_bytes,
            prefill_share=prefill.median * flops / run.ceilings.product_flops_per_s.median,
            decode_share=decode.median / batch * read_bytes / run.ceilings.copy_bytes_per_s.median,
            how=contender.how(first),
        )

    @property
    def _late(self) -> bool:
        limit_s = self._options.limit_s
        return limit_s is not None and time.monotonic() - self._started_s > limit_s

    def _keep(self, **found: object) -> None:
        self.run = self.run.model_copy(update={**found, "duration_s": time.monotonic() - self._started_s})
        write_results(GpuResults(runs=(self.run,)), self._options.output)


def read_device(device: str) -> Device:
    """Raises BenchError where torch has no such device."""
    triton: str | None = None
    with contextlib.suppress(metadata.PackageNotFoundError):
        triton = metadata.version("triton")
    if device == "cpu":
        return Device(name=f"{read_machine().cpu} (a CPU)", memory_bytes=None, cuda=None, triton=triton)
    if not torch.cuda.is_available():
        raise BenchError("torch finds no CUDA device here; --device cpu --size scaled shows on a CPU that it works")
    found = torch.cuda.get_device_properties(0)
    return Device(name=found.name, memory_bytes=found.total_memory, cuda=torch.version.cuda, triton=triton)


def free(device: str) -> None:
    """What nobody refers to any more can be taken again."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
