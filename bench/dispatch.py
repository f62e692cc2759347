"""The dispatch round trip: rows to a host in another process and back, through the client.

The host answers with the rows that it got: what is measured is the way, with all that both ends do to split, write,
check and read, and the weighted sum of the answers.
"""

import os
import secrets
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from bench.checkpoint import SHAPES, write_checkpoint
from bench.child import now_s
from bench.errors import BenchError
from bench.host_process import START_TIMEOUT_S, HostProcess, host_process
from bench.processes import thread_cpu_s
from bench.results import RoundTrip
from experts.client import ExpertClient
from experts.errors import HostSlow, HostUnavailable
from experts.grpc_transport import GrpcTransport
from experts.lane import lanes_serve
from experts.lease_transport import LeaseTransport
from experts.messages import ForwardRequest
from experts.nixl import find_nixl, prepare_environment
from experts.static import StaticPlacement
from experts.transport_kinds import TransportKind
from experts.transports import open_transport
from model.checkpoint import Checkpoint
from router.gate import Routing
from router.placement import initial_placement

HIDDEN = 1024  # a row is 4 KiB
LAYER = 1
WARM_UP_ROUNDS = 30
LOST_S = 30.0  # in which a client must have heard that its host died
SETTLE_S, IDLE_S = 2.0, 5.0  # who has just been busy sleeps lightly for a while
_CONFIG: dict[str, Any] = {
    **SHAPES["bench"],
    "hidden_size": HIDDEN,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_shared_experts": 0,
}


def measure(transports: Sequence[str], payload_bytes: Sequence[int], rounds: int) -> Sequence[RoundTrip]:
    """Round trips of every payload (each way) by every transport that is here; percentiles over `rounds`."""
    results: list[RoundTrip] = []
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        directory = write_checkpoint(_CONFIG, Path(scratch) / "host")
        for transport in transports:
            if not _is_here(transport):
                continue
            results.extend(_measure(directory, cast(TransportKind, transport), payload_bytes, rounds))
    return results


def _is_here(transport: str) -> bool:
    return {"nixl": lambda: find_nixl() is not None, "shared": lanes_serve}.get(transport, lambda: True)()


def _measure(directory: Path, transport: TransportKind, payload_bytes: Sequence[int], rounds: int) -> list[RoundTrip]:
    token = secrets.token_hex(16)
    with host_process("echo", directory, transport, token) as started:
        host = started.host
        way = open_transport(transport, token, None, max(payload_bytes) // (4 * HIDDEN), 1, HIDDEN)
        try:
            if isinstance(way, LeaseTransport) and not way.wait_ready(host, START_TIMEOUT_S):
                raise BenchError(f"the host process did not answer by {transport}")
            source = StaticPlacement(initial_placement(Checkpoint.open(directory).config, [host]))
            client = ExpertClient(way, source)
            idle_cores = _idle_cores((os.getpid(), started.pid))
            found: list[RoundTrip] = []
            for size in payload_bytes:
                rows = max(1, size // (4 * HIDDEN))
                x_TD = torch.randn(rows, HIDDEN)
                routing = Routing((torch.arange(rows) % 2).view(-1, 1), torch.ones(rows, 1))
                times_s: list[float] = []
                for _ in range(WARM_UP_ROUNDS + rounds):
                    started_s = now_s()
                    out_TD = client.start(LAYER, x_TD, routing, source.placement).finish()
                    times_s.append(now_s() - started_s)
                    assert out_TD.shape == x_TD.shape
                ordered = sorted(times_s[WARM_UP_ROUNDS:])
                p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
                row = RoundTrip(
                    transport=transport,
                    payload_bytes=size,
                    rounds=rounds,
                    p50_us=p50 * 1e6,
                    p99_us=p99 * 1e6,
                    idle_cores=idle_cores,
                )
                found.append(row)
            lost_ms = _lost_ms(way, started)
            return [row.model_copy(update={"lost_ms": lost_ms}) for row in found]
        finally:
            way.close()


def _idle_cores(pids: Sequence[int]) -> float:
    """Cores that both ends use, paired and with nothing to do."""
    time.sleep(SETTLE_S)
    before_s = sum(map(thread_cpu_s, pids))
    time.sleep(IDLE_S)
    return (sum(map(thread_cpu_s, pids)) - before_s) / IDLE_S


def _lost_ms(way: GrpcTransport | LeaseTransport, started: HostProcess) -> float:
    """From the death of a host, which this ends, to the error that who waits for its answer gets."""
    os.kill(started.pid, signal.SIGSTOP)  # so that it does not answer before
    os.waitpid(started.pid, os.WUNTRACED)
    nobody = torch.zeros(1, dtype=torch.int32)
    call = way.submit(started.host, ForwardRequest(1, 1, LAYER, torch.zeros(1, HIDDEN), nobody, nobody))
    way.flush()
    os.kill(started.pid, signal.SIGKILL)
    killed_s = now_s()
    try:
        call.result(LOST_S)
    except HostSlow as error:
        raise BenchError(f"a host that was killed is waited for: {error}") from error
    except HostUnavailable:
        return 1000 * (now_s() - killed_s)
    raise BenchError("a host that was killed has answered")
