"""Shoal in one process: the engine and one expert host that it calls directly; no Ray, no sockets, no threads.

The same process counts what would cross to 1, 2 or more hosts: `traffic` gives the client a placement over that many
names, all of them this host, and reads the client's own counters.
"""

import itertools
import sys
import time
from dataclasses import dataclass

from pydantic import TypeAdapter

from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from bench.child import answer_commands
from bench.engine_run import measure_engine
from bench.errors import BenchError
from bench.results import Traffic
from bench.timing import Sample, Workload
from experts.client import ExpertClient
from experts.host import ExpertHost
from experts.local import LocalTransport
from kernels.threads import set_threads
from model.checkpoint import Checkpoint
from router.placement import Host, Placement, initial_placement

CACHE_TOKENS = 32768  # as `shoal serve` gives each worker
MOST_HOSTS = 64


@dataclass(frozen=True, slots=True)
class TrafficCommand:
    """Count the traffic of a workload as if the experts lived in `hosts` hosts."""

    workload: Workload
    hosts: int


@dataclass(slots=True)
class SwitchedPlacement:
    """A PlacementSource whose table the benchmark replaces between measurements."""

    placement: Placement

    def snapshot(self) -> Placement:
        return self.placement

    def names(self, host: Host) -> bool:
        return host in self.placement.hosts

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        time.sleep(timeout_s)
        return self.placement

    def report(self, host: Host, reason: str) -> None:
        raise BenchError(f"{host.id}, in this very process, did not answer: {reason}")


class LocalShoal:
    """An engine with `shoal serve`'s own limits over one host that holds every expert."""

    def __init__(self, directory: str, threads: int) -> None:
        set_threads(threads)
        checkpoint = Checkpoint.open(directory)
        self._config = checkpoint.config
        self._epochs = itertools.count(1)
        self._source = SwitchedPlacement(self._placement(1))
        host = ExpertHost(checkpoint.config, "host-0", 1)
        host.load(checkpoint, self._source.placement.held_by("host-0"))
        self._client = ExpertClient(
            LocalTransport({f"host-{index}": host for index in range(MOST_HOSTS)}), self._source
        )
        limits = EngineLimits()
        limits = EngineLimits(cache_blocks=CACHE_TOKENS // limits.block_size, block_size=limits.block_size)
        self._engine = Engine(Decoder(checkpoint, self._client, self._source), limits)
        self._numbers = itertools.count()

    def measure(self, workload: Workload) -> Sample:
        return measure_engine(self._engine, workload, f"run-{next(self._numbers)}")

    def traffic(self, command: TrafficCommand) -> Traffic:
        """Prefill and decode a workload under a placement over `command.hosts` hosts, and read the counters."""
        self._source.placement = self._placement(command.hosts)
        before, generated = self._client.stats(), self._engine.stats()
        self.measure(command.workload)
        after, now = self._client.stats(), self._engine.stats()
        self._source.placement = self._placement(1)
        # the last token of each sequence is drawn and never computed
        tokens = now.prompt_tokens - generated.prompt_tokens
        tokens += now.generated_tokens - generated.generated_tokens - command.workload.batch
        visits = max(1, tokens * len(self._config.moe_layers))
        return Traffic(
            hosts=command.hosts,
            bytes_sent_per_token_per_layer=(after.bytes_sent - before.bytes_sent) / visits,
            bytes_received_per_token_per_layer=(after.bytes_received - before.bytes_received) / visits,
            rows_sent_per_token_per_layer=(after.rows_sent - before.rows_sent) / visits,
        )

    def _placement(self, hosts: int) -> Placement:
        names = [Host(f"host-{index}", 1, "local") for index in range(hosts)]
        return initial_placement(self._config, names, epoch=next(self._epochs))


def main() -> None:
    """`python -m bench.local_worker DIR THREADS`."""
    shoal = LocalShoal(sys.argv[1], int(sys.argv[2]))
    workload, command = TypeAdapter(Workload), TypeAdapter(TrafficCommand)
    answer_commands(
        {
            "measure": lambda raw: TypeAdapter(Sample).dump_json(shoal.measure(workload.validate_json(raw))),
            "traffic": lambda raw: TypeAdapter(Traffic).dump_json(shoal.traffic(command.validate_json(raw))),
        }
    )


if __name__ == "__main__":
    main()
