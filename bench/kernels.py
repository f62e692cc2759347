"""`python -m bench.kernels`: the packed product beside torch's own (MKL's on x86), by number of rows.

Both multiply [rows, 1024] with one of enough weights [704, 1024] that none is in a cache when its turn comes. The two
take turns, and the median of each is told. `--report` writes the table into docs/performance.md.
"""

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from bench.child import now_s
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
    """GFLOP/s of both at every number of rows, and how much faster the packed one is."""
    weights = [torch.randn(OUTPUTS, INNER) for _ in range(WEIGHTS)]
    packed = [PackedLinear(weight) for weight in weights]
    rows: list[tuple[str, ...]] = []
    for count in ROWS:
        x = torch.randn(count, INNER)
        ours_s: list[float] = []
        theirs_s: list[float] = []
        for _ in range(ROUNDS):
            started_s = now_s()
            for linear in packed:
                linear(x)
            between_s = now_s()
            for weight in weights:
                F.linear(x, weight)
            ours_s.append(between_s - started_s)
            theirs_s.append(now_s() - between_s)
        work = 2e-9 * OUTPUTS * INNER * count * WEIGHTS
        ours, theirs = work / statistics.median(ours_s), work / statistics.median(theirs_s)
        rows.append((str(count), f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"))
    title = f"GFLOP/s of a product with [{OUTPUTS}, {INNER}], {instruction_set()}, {node_threads()} threads"
    return Table(title, ("rows", "packed", "torch", "ratio"), tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.kernels", description="The packed product beside torch's own.")
    parser.add_argument("--report", action="store_true", help=f"write the table into {DOCUMENT}, too")
    report: bool = parser.parse_args().report
    set_threads(node_threads())
    with torch.inference_mode():
        text = markdown_table(measure())
    print(text)
    if report:
        DOCUMENT.write_text(replace_between(DOCUMENT, BEGIN, END, text), encoding="utf-8")


if __name__ == "__main__":
    main()
