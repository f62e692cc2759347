"""Plots of a result file: throughput by batch size, and latencies through HTTP."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.results import PARALLEL, Http, Phase, Results, Throughput
from bench.spread import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES = (7.0, 3.6)
COLOURS = ("#777777", "#1b7f79", "#4c9bd6", "#1f5fa8", "#0b2f5c", "#b5651d")


def draw_plots(results: Results, docs: Path) -> list[Path]:
    """Write bench-prefill.svg, bench-decode.svg and, with figures through HTTP, bench-http.svg; the files written.

    Raises BenchError when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise BenchError("plots need matplotlib: pip install matplotlib, or `make env`") from None
    matplotlib.rcParams["svg.hashsalt"] = "shoal"  # the same results give the same file
    docs.mkdir(parents=True, exist_ok=True)
    drawn = {
        "bench-prefill.svg": _throughput(results, "prefill"),
        "bench-decode.svg": _throughput(results, "decode"),
    }
    if results.http:
        drawn["bench-http.svg"] = _latencies(results)
    for name, figure in drawn.items():
        figure.savefig(docs / name, metadata={"Date": None, "Creator": None})
    return [docs / name for name in drawn]


def _throughput(results: Results, phase: Phase) -> "Figure":
    """Bars of medians by batch size, with the range over the repeats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(results.contenders))
    for index, contender in enumerate(results.contenders):
        rows = [(place, results.find(contender, batch)) for place, batch in enumerate(results.batches)]
        found = [(place, _rate(row, phase)) for place, row in rows if row is not None]
        medians = [rate.median for _, rate in found]
        axes.bar(
            [place + (index - (len(results.contenders) - 1) / 2) * width for place, _ in found],
            medians,
            0.92 * width,
            yerr=[[rate.median - rate.minimum for _, rate in found], [rate.maximum - rate.median for _, rate in found]],
            label=contender,
            color=COLOURS[index % len(COLOURS)],
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )
    axes.set_xticks(range(len(results.batches)), [str(batch) for batch in results.batches])
    axes.set_xlabel("sequences at once")
    axes.set_ylabel(f"{phase}, tokens a second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _latencies(results: Results) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    panels: tuple[tuple[str, Callable[[Http], float], Callable[[Http], float]], ...] = (
        ("time to first token", lambda row: row.first_token_p50_ms, lambda row: row.first_token_p99_ms),
        ("time between tokens", lambda row: row.between_tokens_p50_ms, lambda row: row.between_tokens_p99_ms),
    )
    for axes, (title, median, high) in zip(figure.subplots(1, 2), panels, strict=True):
        places = range(len(results.http))
        for shift, label, value, colour in ((-0.2, "p50", median, "#4c9bd6"), (0.2, "p99", high, "#0b2f5c")):
            axes.bar(
                [place + shift for place in places],
                [value(row) for row in results.http],
                0.38,
                label=label,
                color=colour,
            )
        axes.set_xticks(places, [str(row.streams) for row in results.http])
        axes.set_xlabel(f"streams at once, {PARALLEL}")
        axes.set_ylabel("milliseconds")
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    return figure


def _rate(row: Throughput, phase: Phase) -> Spread:
    return row.prefill_tokens_per_s if phase == "prefill" else row.decode_tokens_per_s
