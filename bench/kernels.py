"""`python -m bench.kernels`: the packed product beside torch's own (MKL's on x86), by number of rows.

All multiply [rows, 1024] with one of enough weights [704, 1024] that none is in a cache when its turn comes: packed
ones in fp32 and in bf16, and torch's in fp32. They take turns, and the median of each is told. `--report` writes the
table into docs/performance.md.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from bench.child import now_s
from bench.errors import BenchError
from bench.report import markdown_table, replace_between
from bench.table import Table
from cluster.threads import node_threads
from kernels.linear import PackedLinear
from kernels.native import instruction_set
from kernels.threads import set_threads

OUTPUTS, INNER, WEIGHTS = 704, 1024, 48
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ROUNDS = 15
DOCUMENT = Path("docs/performance.md")
BEGIN, END = "<!-- kernels:start -->", "<!-- kernels:end -->"


def measure() -> Table:
    """GFLOP/s of each at every number of rows, and how much faster the packed ones are."""
    weights = [torch.randn(OUTPUTS, INNER) for _ in range(WEIGHTS)]
    wide = [PackedLinear(weight) for weight in weights]
    narrow = [PackedLinear(weight.bfloat16()) for weight in weights]
    rows: list[tuple[str, ...]] = []
    for count in ROWS:
        x = torch.randn(count, INNER)
        work = 2e-9 * OUTPUTS * INNER * count * WEIGHTS
        ways = (
            [partial(linear, x) for linear in wide],
            [partial(linear, x) for linear in narrow],
            [partial(F.linear, x, weight) for weight in weights],
        )
        ours, halved, theirs = (work / seconds for seconds in _in_turn(*ways))
        figures = (f"{rate:.0f}" for rate in (ours, halved, theirs))
        rows.append((str(count), *figures, f"{ours / theirs:.2f}", f"{halved / theirs:.2f}"))
    title = f"GFLOP/s of a product with [{OUTPUTS}, {INNER}], {instruction_set()}, {node_threads()} threads"
    heads = ("rows", "packed fp32", "packed bf16", "torch fp32", "fp32 ratio", "bf16 ratio")
    return Table(title, heads, tuple(rows))


def _in_turn(*ways: Sequence[Callable[[], object]]) -> list[float]:
    """The median of each one's seconds, for all its products."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for products, taken_s in zip(ways, seconds, strict=True):
            started_s = now_s()
            for product in products:
                product()
            taken_s.append(now_s() - started_s)
    return [statistics.median(taken_s) for taken_s in seconds]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser("python -m bench.kernels", description="The packed product beside torch's own.")
    parser.add_argument("--report", action="store_true", help=f"write the table into {DOCUMENT}, too")
    report: bool = parser.parse_args().report
    set_threads(node_threads())
    try:
        if report:
            replace_between(DOCUMENT, BEGIN, END, "")  # which is found out before anything is measured
        with torch.inference_mode():
            text = markdown_table(measure())
        print(text)
        if report:
            DOCUMENT.write_text(replace_between(DOCUMENT, BEGIN, END, text), encoding="utf-8")
    except BenchError as error:
        print(f"python -m bench.kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
