"""Results of a GPU as a table and the sentences below it."""

from collections.abc import Iterator

from bench.gpu_results import GpuResults, GpuRun, GpuThroughput
from bench.report import markdown_table
from bench.spread import Spread
from bench.table import Table

NAMES = {"v2-lite": "DeepSeek-V2-Lite's shape", "scaled": "A scaled model"}


def markdown(results: GpuResults) -> str:
    """The table and every note, in GitHub's markdown."""
    return "\n\n".join([markdown_table(table(results)), *notes(results)])


def table(results: GpuResults) -> Table:
    """A row for each contender and workload: tokens a second, and how much of the device they use."""
    first = results.runs[0]
    rows = [row for run in results.runs for row in run.rows]
    contenders = list(dict.fromkeys(row.contender for row in rows))
    rows.sort(key=lambda row: (contenders.index(row.contender), row.prompt_tokens, row.batch))
    title = (
        f"{NAMES[first.size]}, {first.layers} layers, {first.parameters / 1e9:.1f} B random weights in bf16, one "
        f"{first.device.name}; tokens a second"
    )
    columns = ("sequences x prompt tokens", "prefill", "of the product", "decode", "of the copy")
    return Table(title, columns, tuple(_cells(row) for row in rows))


def notes(results: GpuResults) -> Iterator[str]:
    """How the figures came about."""
    yield (
        "Medians (lowest-highest). Shares are of the fastest that the device multiplies and copies: a prompt's token "
        "counts 2 FLOP for each weight that it meets and attention in its absorbed form; a decode step counts every "
        "weight that it needs and all latents, read once."
    )
    for run in results.runs:
        yield from _of_run(run)


def _of_run(run: GpuRun) -> Iterator[str]:
    said = ", ".join(dict.fromkeys(row.contender for row in run.rows)) or "nothing"
    copy, product = run.ceilings.copy_bytes_per_s.median, run.ceilings.product_flops_per_s.median
    changes = ", with uncommitted changes" if run.software.uncommitted_changes else ""
    packages = run.software.packages
    versions = [f"torch {packages.get('torch', 'unknown')}"]
    versions += [] if run.device.triton is None else [f"Triton {run.device.triton}"]
    versions += [] if run.device.cuda is None else [f"CUDA {run.device.cuda}"]
    if any(row.how for row in run.rows):
        versions.append(f"transformers {packages.get('transformers', 'unknown')}")
    yield (
        f"{said}: {run.repeats} repeats, `{run.command}` at {run.software.commit[:12]}{changes}, {run.started[:10]}, "
        f"{run.duration_s / 60:.0f} minutes; {', '.join(versions)}. A copy moves {copy / 1e12:.2f} TB/s, read and "
        f"written; a bf16 product of {run.ceilings.side} x {run.ceilings.side} matrices makes "
        f"{product / 1e12:.0f} TFLOP/s."
    )
    for contender in dict.fromkeys(row.contender for row in run.rows if row.how):
        chosen = "; ".join(f"{_workload(row)}: {row.how}" for row in run.rows if row.contender == contender)
        yield f"{contender} ran eagerly, with sdpa attention and the fastest experts that it has: {chosen}."
    for failure in run.failures:
        yield f"Not measured: {failure}."


def _cells(row: GpuThroughput) -> tuple[str, ...]:
    return (
        f"{row.contender}, {_workload(row)}",
        _rate(row.prefill_tokens_per_s),
        f"{100 * row.prefill_share:.1f} %",
        _rate(row.decode_tokens_per_s),
        f"{100 * row.decode_share:.1f} %",
    )


def _workload(row: GpuThroughput) -> str:
    return f"{row.batch} x {row.prompt_tokens}"


def _rate(value: Spread) -> str:
    return value.text(0 if value.median >= 100 else 1)
