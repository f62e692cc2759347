"""An expert host in a process of its own, without Ray.

`python -m bench.host_process KIND DIR TRANSPORT TOKEN THREADS` prints its address and serves until its standard input
ends. An "echo" answers each pair with its row: the far end of the round trip.
"""

import contextlib
import ctypes
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from torch import Tensor

from bench.errors import BenchError
from experts.frames import HEADER, Coverage, reply_header, write_header
from experts.grpc_server import ExpertServer
from experts.host import ExpertHost
from experts.nixl import prepare_environment
from experts.transport_kinds import TransportKind
from experts.transports import open_door
from kernels.experts import PackedExperts
from kernels.lane import Asked, NativeLane
from kernels.native import native
from kernels.threads import set_threads
from model.checkpoint import Checkpoint
from router.placement import Host

Kind = Literal["echo", "computing"]
START_TIMEOUT_S = 60.0


class EchoExperts(PackedExperts):
    """Checked, batched and answered as others are, and nothing is computed. Every row is asked for once, in order."""

    def __init__(self, hidden_size: int, intermediate_size: int, device: str = "cpu") -> None:
        super().__init__(hidden_size, intermediate_size, device)
        self._ends: dict[int, NativeLane] = {}

    def __call__(self, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor, out_PD: Tensor | None = None) -> Tensor:
        return x_RD.clone() if out_PD is None else out_PD.copy_(x_RD)

    def answer(self, lane: int, asked: Asked, held_E: int) -> bool:
        library = native()
        assert library is not None
        if lane not in self._ends:
            self._ends[lane] = NativeLane.from_address(lane)
        ends, nbytes = self._ends[lane], 4 * asked.pairs * asked.hidden
        answered = reply_header(asked.generation, asked.pairs, asked.hidden, asked.correlation)
        header = bytearray(HEADER.size)
        write_header(header, answered, Coverage.HEADER)
        reply = ends.out + asked.slot * ends.out_slot_bytes
        ctypes.memmove(reply, bytes(header), HEADER.size)
        ctypes.memmove(reply + HEADER.size, ends.in_ + asked.slot * ends.in_slot_bytes + HEADER.size, nbytes)
        library.shoal_announce(lane, asked.slot, HEADER.size + nbytes, asked.correlation, 1)
        return True


@dataclass(frozen=True, slots=True)
class HostProcess:
    host: Host
    pid: int


@contextlib.contextmanager
def host_process(
    kind: Kind, directory: Path, transport: TransportKind, token: str, threads: int = 1
) -> Iterator[HostProcess]:
    """A host that holds every expert and serves until the block ends; raises BenchError when it does not start."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.host_process", kind, str(directory), transport, token, str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        address = process.stdout.readline().strip() if ready else ""
        if not address:
            raise BenchError("the process of the expert host did not start; its output says why")
        yield HostProcess(Host("host-0", 1, address), process.pid)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def main() -> None:
    kind, directory, transport, token, threads = sys.argv[1:]
    prepare_environment()
    set_threads(int(threads))
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    host = ExpertHost(config, "host-0", 1, make_store=EchoExperts if kind == "echo" else PackedExperts)
    host.load(checkpoint, [(layer, expert) for layer in config.moe_layers for expert in range(config.n_routed_experts)])
    server = ExpertServer(host, token=token, door=open_door(cast(TransportKind, transport), "host-0", 1))
    server.start()
    print(server.address, flush=True)
    sys.stdin.read()
    server.stop(0)


if __name__ == "__main__":
    main()
