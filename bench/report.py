"""`python -m bench.report [RESULTS]`: README's table and the plots of docs/, from a result file and nothing else."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError
from bench.options import OUTPUT
from bench.plots import draw_plots
from bench.results import Results, read_results
from bench.table import Table, notes, tables

BEGIN, END = "<!-- bench:start -->", "<!-- bench:end -->"
README, DOCS = Path("README.md"), Path("docs")


def write_report(results: Results, readme: Path = README, docs: Path = DOCS) -> list[Path]:
    """Replace what stands between README's markers, and draw the plots; the files written.

    Raises BenchError, before anything is written, when README lacks the markers.
    """
    text = _replaced(readme, markdown(results))
    readme.write_text(text, encoding="utf-8")
    return [readme, *draw_plots(results, docs)]


def markdown(results: Results) -> str:
    """Every table and note, in GitHub's markdown."""
    return "\n\n".join([*(_markdown_table(table) for table in tables(results)), *notes(results)])


def _markdown_table(table: Table) -> str:
    lines = [
        f"**{table.title}**",
        "",
        f"| {' | '.join(table.columns)} |",
        f"|{'|'.join(['---', *['---:'] * (len(table.columns) - 1)])}|",
        *(f"| {' | '.join(row)} |" for row in table.rows),
    ]
    return "\n".join(lines)


def _replaced(readme: Path, body: str) -> str:
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{readme} cannot be read ({error.strerror}): run from the repository's root") from error
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{readme} has no lines {BEGIN} and {END}, in this order: the table goes between them")
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser("python -m bench.report", description=str(__doc__).partition(": ")[2])
    parser.add_argument("results", nargs="?", type=Path, default=OUTPUT, metavar="RESULTS")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where the plots go")
    options = parser.parse_args(arguments)
    try:
        for path in write_report(read_results(options.results), options.readme, options.docs):
            print(f"wrote {path}")
    except BenchError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
