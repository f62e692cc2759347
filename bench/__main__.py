"""`python -m bench`, which is `shoal bench`."""

import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from rich.console import Console

from bench.checkpoint import ensure_checkpoint
from bench.errors import BenchError
from bench.options import CHECKPOINT, Options, parse
from bench.report import write_report
from bench.results import write_results
from bench.run import measure
from bench.table import print_results

LOG_COLUMNS = 200  # a table in a log file is read with a scroll bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON file, print the tables; the exit status is 1 for what went wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    signal.signal(signal.SIGTERM, _leave)  # so that what was started is ended
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=LOG_COLUMNS)
    try:
        _run(options, _command(given), console)
    except (BenchError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(options: Options, command: str, console: Console) -> None:
    started_s = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - started_s:5.0f} s  {text}", markup=False, soft_wrap=True)

    if options.checkpoint == CHECKPOINT and not (CHECKPOINT / "config.json").is_file():
        say(f"writing {CHECKPOINT}: 3.4 GB of random weights")
        ensure_checkpoint(CHECKPOINT)
    results = measure(options, command, say)
    write_results(results, options.output)
    print_results(results, console)
    say(f"wrote {options.output}")
    if options.report:
        for path in write_report(results):
            say(f"wrote {path}")


def _command(given: Sequence[str]) -> str:
    """The command as anyone can repeat it: of absolute paths the last part only."""
    return " ".join(["python -m bench", *(word.rpartition("/")[2] if word.startswith("/") else word for word in given)])


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
