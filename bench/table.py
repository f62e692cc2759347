"""Results as tables: one description, drawn in the terminal by rich and in README as markdown."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from bench.processes import EXPERT_HOST
from bench.results import BASELINE, LOCAL, PARALLEL, Ceiling, Results
from bench.spread import Spread

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column names, and cells; the first column is text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(results: Results) -> Iterator[Table]:
    """Every section that has figures."""
    sections = (_throughput, _ratios, _http, _training, _start_up, _round_trips, _traffic, _memory)
    for section in sections:
        table = section(results)
        if table.rows:
            yield table


def notes(results: Results) -> Iterator[str]:
    """How the figures came about, a sentence each."""
    run, machine, software = results.run, results.run.machine, results.run.software
    versions = ", ".join(f"{name} {version}" for name, version in software.packages.items())
    yield (
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / (1 << 30):.0f} GiB, {machine.kernel}; "
        f"Python {software.python}, {versions}."
    )
    yield (
        f"{run.parameters / 1e6:.0f} M parameters, computed in fp32; prompts of {run.prompt_tokens} random tokens, "
        f"{run.decode_tokens} tokens decoded, {run.repeats} interleaved repeats: median (lowest-highest). "
        f"Ratios are formed within each repeat."
    )
    changes = ", with uncommitted changes" if software.uncommitted_changes else ""
    yield f"`{run.command}` at {software.commit[:12]}{changes}, {run.started[:10]}, {run.duration_s / 60:.0f} minutes."
    if run.quick:
        yield "A quick run: it shows that everything works, and its figures say nothing."
    if results.baseline is not None:
        chosen = "; ".join(
            f"B={row.batch}: {row.prefill_attention} attention and {row.prefill_experts} experts for prefill, "
            f"{row.decode_attention} and {row.decode_experts} for decode"
            for row in results.baseline.implementations
        )
        yield f"transformers ran its fastest here, of everything tried: {results.baseline.waiting} waiting; {chosen}."
    same = [
        row.same_answers for row in results.throughput if row.contender != BASELINE and row.same_answers is not None
    ]
    if same:
        yield f"Shoal's greedy tokens are transformers' in {100 * sum(same) / len(same):.0f} % of all measured answers."
    if any(row.role == EXPERT_HOST for row in results.memory):
        yield "Of a service's expert hosts one is its stand-by, which holds no expert until another host dies."
    if run.idle_service_cores is not None:
        own = "" if run.idle_own_cores is None else f", {100 * run.idle_own_cores:.1f} % without Ray's own processes"
        yield f"An idle {PARALLEL}, Ray included, uses {100 * run.idle_service_cores:.1f} % of a core{own}."
    if results.ceiling is not None:
        yield _ceiling(results, results.ceiling)
    idle = {row.transport: row.idle_cores for row in results.round_trips if row.idle_cores is not None}
    if idle:
        said = ", ".join(f"{100 * cores:.1f} % by {transport}" for transport, cores in idle.items())
        yield f"A paired client and host with nothing to do use, of a core, together and without Ray: {said}."
    lost = {row.transport: row.lost_ms for row in results.round_trips if row.lost_ms is not None}
    if lost:
        said = ", ".join(f"{ms:.0f} ms by {transport}" for transport, ms in lost.items())
        yield f"Who waits for a host that is killed is told so after {said}."
    if results.round_trips_missing is not None:
        yield f"No dispatch round trips: {results.round_trips_missing}."


def _ceiling(results: Results, ceiling: Ceiling) -> str:
    said = (
        f"A large product in fp32 reaches {ceiling.product_gflops:.0f} GFLOP/s here, and a prompt's token takes "
        f"{ceiling.token_gflop:.2f} GFLOP of products with weights alone: at most {ceiling.tokens_per_s:.0f} tokens/s"
    )
    bases = [(batch, row) for batch in results.batches if (row := results.find(BASELINE, batch)) is not None]
    times = [f"{ceiling.tokens_per_s / row.prefill_tokens_per_s.median:.1f} at B={batch}" for batch, row in bases]
    return said + (f", which is transformers' prefill times {', '.join(times)}." if times else ".")


def print_results(results: Results, console: Console) -> None:
    for table in tables(results):
        drawn = RichTable(title=table.title, title_justify="left")
        for index, column in enumerate(table.columns):
            drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    for note in notes(results):
        console.print(note, markup=False, highlight=False)


def _phases(results: Results) -> tuple[str, ...]:
    return tuple(f"{phase} B={batch}" for phase in ("prefill", "decode") for batch in results.batches)


def _throughput(results: Results) -> Table:
    def rate(value: Spread) -> str:
        return value.text(0 if value.median >= 100 else 1)

    rows: list[tuple[str, ...]] = []
    for contender in results.contenders:
        found = [results.find(contender, batch) for batch in results.batches]
        prefill = [rate(row.prefill_tokens_per_s) if row else "" for row in found]
        decode = [rate(row.decode_tokens_per_s) if row else "" for row in found]
        rows.append((contender, *prefill, *decode))
    return Table("Tokens a second", ("", *_phases(results)), tuple(rows))


def _ratios(results: Results) -> Table:
    rows: list[tuple[str, ...]] = []
    for contender in results.contenders:
        found = [results.find(contender, batch) for batch in results.batches]
        prefill = [_ratio(row.prefill_ratio) if row else "" for row in found]
        decode = [_ratio(row.decode_ratio) if row else "" for row in found]
        if contender != BASELINE and any((*prefill, *decode)):
            rows.append((f"{contender} ÷ {BASELINE}", *prefill, *decode))
    taxed = {row.batch: row for row in results.tax}
    if taxed:
        prefill = [_ratio(taxed[batch].prefill_ratio) if batch in taxed else "" for batch in results.batches]
        decode = [_ratio(taxed[batch].decode_ratio) if batch in taxed else "" for batch in results.batches]
        rows.append((f"{PARALLEL} ÷ {LOCAL}", *prefill, *decode))
    return Table("Ratios", ("", *_phases(results)), tuple(rows))


def _http(results: Results) -> Table:
    rows = tuple(
        (
            f"{row.streams} streams" if row.streams > 1 else "1 stream",
            f"{row.first_token_p50_ms:.0f}",
            f"{row.first_token_p99_ms:.0f}",
            f"{row.between_tokens_p50_ms:.1f}",
            f"{row.between_tokens_p99_ms:.1f}",
            f"{row.decode_tokens_per_s.median:.1f}",
            _ratio(row.decode_ratio_to_door),
        )
        for row in results.http
    )
    columns = ("", "first token p50", "p99", "between tokens p50", "p99", "decode tokens/s", "÷ without HTTP")
    return Table(f"Through HTTP, {PARALLEL}, streams begun at once; milliseconds", columns, rows)


def _training(results: Results) -> Table:
    rows = tuple(
        (
            row.contender,
            f"{row.tokens_per_s.median:.0f} ({row.tokens_per_s.minimum:.0f}-{row.tokens_per_s.maximum:.0f})",
            _ratio(row.ratio) if row.contender != BASELINE else "",
        )
        for row in results.training
    )
    tokens = results.training[0].tokens_per_step if results.training else 0
    columns = ("", "tokens/s", f"÷ {BASELINE}")
    return Table(f"Full fine-tuning with AdamW, {tokens} tokens a step", columns, rows)


def _start_up(results: Results) -> Table:
    rows = tuple(
        (row.contender, f"{row.first_token_s.median:.1f}", f"{row.first_token_s.maximum:.1f}")
        for row in results.start_up
    )
    return Table("From the command to the first token, warm page cache; seconds", ("", "median", "highest"), rows)


def _round_trips(results: Results) -> Table:
    rows = tuple(
        (f"{row.transport}, {row.payload_bytes // 1024} KB each way", f"{row.p50_us:.0f}", f"{row.p99_us:.0f}")
        for row in results.round_trips
    )
    return Table("Dispatch round trip, same node; microseconds", ("", "p50", "p99"), rows)


def _traffic(results: Results) -> Table:
    rows = tuple(
        (
            f"{row.hosts} hosts" if row.hosts > 1 else "1 host",
            f"{row.bytes_sent_per_token_per_layer:.0f}",
            f"{row.bytes_received_per_token_per_layer:.0f}",
            f"{row.rows_sent_per_token_per_layer:.2f}",
        )
        for row in results.traffic
    )
    return Table("Bytes a token a MoE layer", ("", "sent", "received", "hosts a token"), rows)


def _memory(results: Results) -> Table:
    rows = tuple(
        (
            f"{row.contender}: {row.role}" + (f" ({row.processes})" if row.processes > 1 else ""),
            f"{row.largest_peak_bytes / MIB:.0f}",
            f"{row.share_bytes / MIB:.0f}",
        )
        for row in results.memory
    )
    columns = ("", "largest peak of one", "proportional share of all")
    return Table("Memory by process, mapped files included; MiB", columns, rows)


def _ratio(value: Spread | None) -> str:
    return value.text(2) if value is not None else ""
