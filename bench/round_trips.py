"""The dispatch round trip by transport and payload, as `bench.dispatch` measures it."""

import importlib
from collections.abc import Sequence
from typing import Protocol, cast

from bench.results import RoundTrip

MODULE = "bench.dispatch"
TRANSPORTS = ("grpc", "nixl")
PAYLOADS_BYTES = (4 * 1024, 64 * 1024, 512 * 1024, 4 * 1024 * 1024)
ROUNDS, QUICK_ROUNDS = 1000, 50


class _Measured(Protocol):
    transport: str
    payload_bytes: int
    rounds: int
    p50_us: float
    p99_us: float


class _Dispatch(Protocol):
    def measure(self, transports: Sequence[str], payload_bytes: Sequence[int], rounds: int) -> Sequence[_Measured]: ...


def measure_round_trips(quick: bool) -> tuple[tuple[RoundTrip, ...], str | None]:
    """What was measured, and why there is nothing when there is nothing."""
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
        return (), f"{MODULE} is not part of this build"
    measured = cast(_Dispatch, module).measure(TRANSPORTS, PAYLOADS_BYTES, QUICK_ROUNDS if quick else ROUNDS)
    rows = tuple(
        RoundTrip(
            transport=result.transport,
            payload_bytes=result.payload_bytes,
            rounds=result.rounds,
            p50_us=result.p50_us,
            p99_us=result.p99_us,
        )
        for result in measured
    )
    return rows, None if rows else f"{MODULE} found none of {', '.join(TRANSPORTS)}"
