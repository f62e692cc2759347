"""The dispatch round trip: rows to a host in another process and back, through the client's transport.

The host answers with the rows it got: what is measured is the way, with all that both ends do to read, check and write
a frame.
"""

import contextlib
import secrets
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from bench.checkpoint import SHAPES, write_checkpoint
from bench.child import now_s
from bench.errors import BenchError
from bench.results import RoundTrip
from experts.messages import ForwardRequest
from experts.nixl import find_nixl, prepare_environment
from experts.nixl_transport import NixlTransport
from experts.transport_kinds import TransportKind
from experts.transports import open_transport
from router.placement import Host

HIDDEN = 1024  # a row is 4 KiB
WARM_UP_ROUNDS = 30
START_TIMEOUT_S = 60.0
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
    """Round trips of every payload (each way) by every transport that is installed; percentiles over `rounds`."""
    results: list[RoundTrip] = []
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        directory = write_checkpoint(_CONFIG, Path(scratch) / "host")
        for transport in transports:
            if transport == "nixl" and find_nixl() is None:
                continue
            results.extend(_measure(directory, cast(TransportKind, transport), payload_bytes, rounds))
    return results


def _measure(
    directory: Path, transport: TransportKind, payload_bytes: Sequence[int], rounds: int
) -> Iterator[RoundTrip]:
    token = secrets.token_hex(16)
    with _host_process(directory, transport, token) as address:
        host = Host("host-0", 1, address)
        way = open_transport(transport, token, None, max(payload_bytes) // (4 * HIDDEN), 1, HIDDEN)
        try:
            if isinstance(way, NixlTransport) and not way.wait_ready(host, START_TIMEOUT_S):
                raise BenchError("the host process did not answer by NIXL")
            for size in payload_bytes:
                request = _request(max(1, size // (4 * HIDDEN)))
                times_s: list[float] = []
                for _ in range(WARM_UP_ROUNDS + rounds):
                    started_s = now_s()
                    pending = way.submit(host, request)
                    reply = pending.result(START_TIMEOUT_S)
                    times_s.append(now_s() - started_s)
                    assert reply.y_PD.shape == request.x_RD.shape
                    pending.release()
                ordered = sorted(times_s[WARM_UP_ROUNDS:])
                p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
                yield RoundTrip(
                    transport=transport, payload_bytes=size, rounds=rounds, p50_us=p50 * 1e6, p99_us=p99 * 1e6
                )
        finally:
            way.close()


def _request(rows: int) -> ForwardRequest:
    """Each row to one expert."""
    indices = torch.arange(rows, dtype=torch.int32)
    return ForwardRequest(
        epoch=1, generation=1, layer=1, x_RD=torch.randn(rows, HIDDEN), pair_row_P=indices, pair_expert_P=indices % 2
    )


@contextlib.contextmanager
def _host_process(directory: Path, transport: str, token: str) -> Iterator[str]:
    """The address of a host that serves until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.dispatch_host", str(directory), transport, token],
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
            raise BenchError("the host process of the dispatch round trip did not start; its output says why")
        yield address
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
