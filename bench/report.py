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
    text = replace_between(readme, BEGIN, END, markdown(results))
    readme.write_text(text, encoding="utf-8")
    return [readme, *draw_plots(results, docs)]


def markdown(results: Results) -> str:
    """Every table and note, in GitHub's markdown."""
    return "\n\n".join([*(markdown_table(table) for table in tables(results)), *notes(results)])


def markdown_table(table: Table) -> str:
    """A table with its title above it."""
    lines = [
        f"**{table.title}**",
        "",
        f"| {' | '.join(table.columns)} |",
        f"|{'|'.join(['---', *['---:'] * (len(table.columns) - 1)])}|",
        *(f"| {' | '.join(row)} |" for row in table.rows),
    ]
    return "\n".join(lines)


def replace_between(document: Path, begin: str, end: str, body: str) -> str:
    """The document's text with `body` between two markers; raises BenchError when it lacks them."""
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{document} cannot be read ({error.strerror}): run from the repository's root") from error
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise BenchError(f"{document} has no lines {begin} and {end}, in this order: the table goes between them")
    return f"{head}{begin}\n{body}\n{end}{tail}"


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
