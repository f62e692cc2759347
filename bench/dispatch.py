"""The dispatch round trip: rows to a host in another process and back, through the client's transport.

The host answers with the rows it got: what is measured is the way, with all that both ends do to read, check and write
a frame.
"""

import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from bench.checkpoint import SHAPES, write_checkpoint
from bench.child import now_s
from bench.errors import BenchError
from bench.host_process import START_TIMEOUT_S, host_process
from bench.results import RoundTrip
from experts.messages import ForwardRequest
from experts.nixl import find_nixl, prepare_environment
from experts.nixl_transport import NixlTransport
from experts.transport_kinds import TransportKind
from experts.transports import open_transport

HIDDEN = 1024  # a row is 4 KiB
WARM_UP_ROUNDS = 30
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
    with host_process("echo", directory, transport, token) as host:
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
