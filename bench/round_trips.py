"""Which dispatch round trips a run measures."""

from bench.dispatch import measure
from bench.results import RoundTrip

TRANSPORTS = ("grpc", "nixl", "shared")
PAYLOADS_BYTES = (4 * 1024, 64 * 1024, 512 * 1024, 4 * 1024 * 1024)
ROUNDS, QUICK_ROUNDS = 1000, 50


def measure_round_trips(quick: bool) -> tuple[tuple[RoundTrip, ...], str | None]:
    """What was measured, and why something is not there."""
    rows = tuple(measure(TRANSPORTS, PAYLOADS_BYTES, QUICK_ROUNDS if quick else ROUNDS))
    left_out = [name for name in TRANSPORTS if name not in {row.transport for row in rows}]
    return rows, f"{', '.join(left_out)} cannot be used here" if left_out else None
