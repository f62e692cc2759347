"""Shoal in one process on one device: the engine, and one host of every expert that it calls directly."""

import itertools
from collections.abc import Sequence

import torch

from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from attention.scheduler import SchedulerLimits
from bench.engine_run import measure_engine
from bench.errors import BenchError
from bench.random_checkpoint import RandomCheckpoint
from bench.timing import Sample, Workload
from experts.client import ExpertClient
from experts.host import ExpertHost
from experts.local import LocalTransport
from experts.static import StaticPlacement
from router.placement import Host, initial_placement

STEP_TOKENS = 4096  # of prompts, so that a step is limited by multiplying alone


def engine_limits(workloads: Sequence[tuple[int, int]], decode_tokens: int) -> EngineLimits:
    """Room for the largest of (batch, prompt tokens): all of its sequences at once, to the last token."""
    size = EngineLimits().block_size
    lengths = [prompt_tokens + Workload(((),) * batch, decode_tokens).most_tokens for batch, prompt_tokens in workloads]
    return EngineLimits(
        cache_blocks=max(batch * -(-length // size) for (batch, _), length in zip(workloads, lengths, strict=True)),
        block_size=size,
        max_length=max(lengths),
        scheduler=SchedulerLimits(step_tokens=STEP_TOKENS, running=max(batch for batch, _ in workloads)),
    )


class GpuShoal:
    """An engine over one host that holds every expert, with random weights."""

    def __init__(self, checkpoint: RandomCheckpoint, limits: EngineLimits) -> None:
        host = ExpertHost(checkpoint.config, "host-0", 1, checkpoint.device)
        placement = initial_placement(checkpoint.config, [Host("host-0", 1, "local")])
        host.load(checkpoint, placement.held_by("host-0"))
        source = StaticPlacement(placement)
        client = ExpertClient(LocalTransport({"host-0": host}), source)
        self._device = checkpoint.device
        self._engine = Engine(Decoder(checkpoint, client, source, checkpoint.device), limits)
        self._numbers = itertools.count()

    def prepare(self, workload: Workload) -> None:
        """Compile, tune and record whatever a workload of this shape needs."""
        self.measure(workload)

    def measure(self, workload: Workload) -> Sample:
        """Raises BenchError when it was not all computed, and once: then the rates say nothing."""
        if torch.device(self._device).type == "cuda":
            torch.cuda.synchronize()
        before = self._engine.stats()
        sample = measure_engine(self._engine, workload, f"run-{next(self._numbers)}")
        after = self._engine.stats()
        if after.reused_tokens != before.reused_tokens:
            raise BenchError(f"{after.reused_tokens - before.reused_tokens} tokens of the prompts were not computed")
        if after.preemptions != before.preemptions:
            raise BenchError(f"{after.preemptions - before.preemptions} sequences lost their place in the cache")
        return sample

    def how(self, workload: Workload) -> str | None:
        return None
