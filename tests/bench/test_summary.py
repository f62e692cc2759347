"""From samples to figures: what is compared with what."""

from bench import summary
from bench.processes import ProcessMemory, role_of
from bench.streams import Latencies, Streamed
from bench.summary import Collected
from bench.timing import Sample


def sample(prefill: float, decode: float, answer: int = 1) -> Sample:
    """Rates in tokens a second."""
    return Sample(
        prefill_tokens=100, prefill_s=100 / prefill, decode_tokens=10, decode_s=10 / decode, answers=((answer, 2),)
    )


def collected() -> Collected:
    return Collected(
        samples={
            ("transformers", 8): {0: sample(100, 10), 1: sample(200, 20)},
            ("shoal-local", 8): {0: sample(200, 40), 1: sample(400, 60)},
            ("shoal-2", 8): {0: sample(150, 30), 1: sample(300, 45, answer=5)},
        }
    )


def test_ratios_and_tax_are_formed_in_each_repeat() -> None:
    rows = {row.contender: row for row in summary.throughput(collected())}
    decode = rows["shoal-2"].decode_ratio
    assert decode is not None
    assert [round(value, 9) for value in decode.samples] == [3.0, 2.25]
    (tax,) = summary.tax(collected())
    assert [round(value, 9) for value in tax.decode_ratio.samples] == [0.75, 0.75]
    assert rows["shoal-local"].same_answers == 1.0
    assert rows["shoal-2"].same_answers == 0.5


def test_without_transformers_there_are_rates_and_no_ratios() -> None:
    found = collected()
    del found.samples["transformers", 8]
    rows = summary.throughput(found)
    assert all(row.prefill_ratio is None and row.same_answers is None for row in rows)
    assert rows[0].prefill_tokens_per_s.median == 300.0


def test_http_pools_latencies_and_compares_with_the_door_of_the_same_repeat() -> None:
    found = collected()
    for repeat, decode in ((0, 27.0), (1, 45.0)):
        latencies = Latencies(first_token_s=(0.1 + repeat,), between_tokens_s=(0.01, 0.03))
        found.http.setdefault(8, {})[repeat] = [Streamed(sample(100, decode), latencies)]
    (row,) = summary.http(found)
    assert round(row.first_token_p50_ms, 6) == 600.0
    assert round(row.between_tokens_p50_ms, 6) == 20.0
    assert (row.first_tokens, row.gaps) == (2, 4)
    assert row.decode_ratio_to_door is not None
    assert [round(value, 9) for value in row.decode_ratio_to_door.samples] == [0.9, 1.0]


def test_memory_is_told_by_role() -> None:
    found = Collected(memory={"shoal-2": [ProcessMemory("expert host", 5, 3), ProcessMemory("expert host", 7, 2)]})
    (row,) = summary.memory(found)
    assert (row.processes, row.largest_peak_bytes, row.share_bytes) == (2, 7, 5)


def test_roles_are_read_from_command_lines() -> None:
    assert role_of("ray::ServeReplica:p8400:attention") == "attention worker"
    assert role_of("ray::ExpertActor.wait_for_end") == "expert host"
    assert role_of("ray::ServeReplica:p8400:ingress") == "ingress"
    assert role_of("/usr/bin/gcs_server") == "Ray itself"
