"""`python -m bench.gpu`: one process on one GPU, at DeepSeek-V2-Lite's full shape, beside what the GPU could do.

Weights are random and made on the device. The file is written after each workload, so that a run that is ended keeps
what it found. `--report` writes the table into README.md.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError
from bench.gpu_options import PROGRAM, parse
from bench.gpu_results import GpuResults, merge, read_results
from bench.gpu_run import GpuBenchmark
from bench.gpu_table import markdown
from bench.report import replace_between
from bench.results import write_results

README = Path("README.md")
BEGIN, END = "<!-- gpu:start -->", "<!-- gpu:end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or merge, write the JSON file, print the table; the exit status is 1 for what went wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:5.0f} s  {text}", flush=True)

    try:
        if options.merge:
            results = merge([read_results(path) for path in options.merge])
        else:
            results = GpuResults(runs=(GpuBenchmark(options, _command(given), say).measure(),))
        write_results(results, options.output)
        text = markdown(results)
        if options.report:
            README.write_text(replace_between(README, BEGIN, END, text), encoding="utf-8")
        print(f"\n{text}\n\nwrote {options.output}", flush=True)
    except BenchError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0 if any(run.rows for run in results.runs) else 1


def _command(given: Sequence[str]) -> str:
    """The command as anyone can repeat it: of absolute paths the last part only."""
    return " ".join([PROGRAM, *(word.rpartition("/")[2] if word.startswith("/") else word for word in given)])


if __name__ == "__main__":
    sys.exit(main())
