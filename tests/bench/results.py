"""A result file made by hand, small enough to be read beside the tests."""

from bench.machine import Machine, Software
from bench.results import (
    FORMAT,
    BaselineSettings,
    Ceiling,
    Http,
    Implementation,
    Memory,
    Results,
    RoundTrip,
    Run,
    StartUp,
    Tax,
    Throughput,
    Traffic,
    Training,
)
from bench.spread import ratio, spread


def rates(*samples: float) -> dict[int, float]:
    return dict(enumerate(samples))


def throughput(contender: str, batch: int, prefill: dict[int, float], decode: dict[int, float]) -> Throughput:
    """A row whose baseline always has 100 and 10 tokens a second."""
    slow, slower = dict.fromkeys(prefill, 100.0), dict.fromkeys(decode, 10.0)
    return Throughput(
        contender=contender,
        batch=batch,
        prefill_tokens_per_s=spread(list(prefill.values())),
        decode_tokens_per_s=spread(list(decode.values())),
        prefill_ratio=ratio(prefill, slow),
        decode_ratio=ratio(decode, slower),
        same_answers=1.0,
    )


def made_by_hand(round_trips_missing: str | None = None) -> Results:
    return Results(
        format=FORMAT,
        run=Run(
            started="2026-01-02T03:04:05+00:00",
            duration_s=600.0,
            command="python -m bench",
            quick=False,
            seed=0,
            repeats=3,
            threads=2,
            service_threads=None,
            prompt_tokens=128,
            decode_tokens=32,
            checkpoint="bench",
            parameters=855_281_152,
            machine=Machine(cpu="A processor", cores=2, memory_bytes=24 << 30, kernel="Linux 6"),
            software=Software(
                python="3.11.7", packages={"torch": "2.13.0"}, commit="0123456789abcdef", uncommitted_changes=False
            ),
            paused_cpu_s=0.0,
            idle_service_cores=0.02,
            idle_own_cores=0.005,
        ),
        baseline=BaselineSettings(
            waiting="passive",
            implementations=(
                Implementation(
                    batch=8,
                    prefill_attention="sdpa",
                    prefill_experts="grouped_mm",
                    decode_attention="eager",
                    decode_experts="batched_mm",
                ),
            ),
        ),
        throughput=(
            throughput("transformers", 8, rates(100.0, 100.0, 100.0), rates(10.0, 10.0, 10.0)),
            throughput("shoal-local", 8, rates(210.0, 200.0, 190.0), rates(26.0, 30.0, 28.0)),
            throughput("shoal-2", 8, rates(200.0, 190.0, 180.0), rates(25.0, 24.0, 23.0)),
        ),
        tax=(Tax(batch=8, prefill_ratio=spread([0.95, 0.96, 0.97]), decode_ratio=spread([0.88, 0.91, 0.89])),),
        http=(
            Http(
                streams=8,
                first_token_p50_ms=900.0,
                first_token_p99_ms=1200.0,
                between_tokens_p50_ms=81.5,
                between_tokens_p99_ms=140.25,
                first_tokens=24,
                gaps=744,
                decode_tokens_per_s=spread([23.0, 24.0, 22.0]),
                decode_ratio_to_door=spread([0.96, 0.97, 0.95]),
            ),
        ),
        start_up=(StartUp(contender="shoal-2", first_token_s=spread([17.5, 18.25, 17.0])),),
        round_trips=()
        if round_trips_missing
        else (
            RoundTrip(
                transport="nixl",
                payload_bytes=65536,
                rounds=1000,
                p50_us=57.4,
                p99_us=103.0,
                idle_cores=0.012,
                lost_ms=31.4,
            ),
        ),
        round_trips_missing=round_trips_missing,
        traffic=(
            Traffic(
                hosts=2,
                bytes_sent_per_token_per_layer=7000.0,
                bytes_received_per_token_per_layer=24576.0,
                rows_sent_per_token_per_layer=1.75,
            ),
        ),
        memory=(
            Memory(
                contender="shoal-2", role="expert host", processes=2, largest_peak_bytes=2 << 30, share_bytes=3 << 30
            ),
        ),
        training=(
            Training(
                contender="shoal-2",
                tokens_per_step=2048,
                tokens_per_s=spread([150.0, 180.0, 170.0]),
                ratio=ratio(rates(150.0, 180.0, 170.0), rates(100.0, 120.0, 100.0)),
            ),
        ),
        ceiling=Ceiling(product_gflops=200.0, token_gflop=0.4),
    )
