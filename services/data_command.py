"""`shoal data`: look at training data before a run does."""

import argparse
import json
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:  # loading them takes longer than any other subcommand needs
    from services.training.data.problems import ProblemLog
    from services.training.data.reading import Read, Source
    from services.training.data.samples import Sample
    from services.training.data.summary import Summary

FORMATS = ("auto", "messages", "alpaca", "sharegpt", "text")
OVERLONG = ("error", "drop", "truncate", "split")
SEQUENCE_LENGTH = 1024  # a recipe's default
LEARNED_STYLE = "bold green"
BEGIN, END = "{+", "+}"  # around what is learned, where there are no colours

CONTROL = ("Cc", "Cs")


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample to print: its text in pieces, and whether each is learned."""

    path: Path
    sample: "Sample"
    pieces: list[tuple[str, bool]]


def add_parser(commands_: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `data` and its actions to the command line."""
    text = "Look at training data before a run does."
    actions = commands_.add_parser("data", help=text, description=text).add_subparsers(required=True, metavar="ACTION")
    text = "Say what is wrong with training data, how long it is, and what would be learned; 1 when something is wrong."
    command = actions.add_parser("check", help=text, description=text)
    command.add_argument("file", nargs="+", metavar="FILE", help=".jsonl, .json or .txt")
    command.add_argument(
        "--model", metavar="DIR", help="checkpoint with tokenizer and chat template; without, formats alone are checked"
    )
    command.add_argument("--format", choices=FORMATS, default="auto", help="default: by the first record")
    command.add_argument(
        "--sequence-length",
        type=int,
        default=SEQUENCE_LENGTH,
        metavar="N",
        help=f"tokens of the context ({SEQUENCE_LENGTH})",
    )
    command.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="of the records, not looked at; may be given more than once",
    )
    command.add_argument("--overlong", choices=OVERLONG, default="error", help="samples beyond the context (error)")
    command.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N samples, with what is learned marked"
    )
    command.add_argument("--json", action="store_true", help="for scripts")
    command.set_defaults(run=check)


def check(options: argparse.Namespace) -> int:
    """Print the report; 0 when a run could train on the files, 1 when not, 2 when they cannot even be looked at."""
    from services.training.data.reading import Reading, read_formats, read_samples
    from services.training.data.summary import runs, summarise
    from services.training.data.training_tokenizer import TrainingTokenizer

    paths = [Path(file) for file in options.file]
    try:
        if options.show < 0:
            raise ValueError(f"--show {options.show} given; expected how many samples to print")
        reading = Reading(options.sequence_length, options.format, options.overlong, tuple(options.ignore))
        if options.model is None:
            if options.show:
                raise ValueError("--show given without --model: its chat template is what a sample is shown by")
            return _tell_formats(*read_formats(paths, reading, most_problems=sys.maxsize), as_json=options.json)
        tokenizer = TrainingTokenizer.load(options.model)
        read = read_samples(paths, tokenizer, reading, most_problems=sys.maxsize)
    except ValueError as error:
        print(f"shoal: {error}", file=sys.stderr)
        return 2
    summary = summarise(read, options.sequence_length)
    samples = [read.samples[index] for index in range(min(options.show, len(read.samples)))]
    shown = [Shown(read.sources[sample.source].path, sample, runs(sample, tokenizer)) for sample in samples]
    if options.json:
        print(json.dumps(_document(read, summary, shown), indent=2))
    else:
        console = Console(highlight=False)
        _print_summary(console, read, summary, options.sequence_length)
        _print_problems(console, read.problems)
        for one in shown:
            _print_sample(console, one)
    return 1 if read.problems.count else 0


def _tell_formats(sources: "Sequence[Source]", problems: "ProblemLog", as_json: bool) -> int:
    """What was found without a model; 0 when nothing is wrong."""
    if as_json:
        print(json.dumps(_found(sources, problems), indent=2))
    else:
        console = Console(highlight=False)
        _print_sources(console, sources)
        _print(console, "formats alone were checked: tokens, lengths and what is learned are told with --model DIR")
        _print_problems(console, problems)
    return 1 if problems.count else 0


def _document(read: "Read", summary: "Summary", shown: "list[Shown]") -> dict[str, Any]:
    return {
        **_found(read.sources, read.problems),
        **asdict(summary),
        "targets_share": summary.targets_share,
        "shown": [
            {
                "path": str(one.path),
                "line": one.sample.line,
                "pieces": [{"text": text, "learned": learned} for text, learned in one.pieces],
            }
            for one in shown
        ],
    }


def _found(sources: "Sequence[Source]", problems: "ProblemLog") -> dict[str, Any]:
    return {
        "files": [{name: _plain(value) for name, value in asdict(source).items()} for source in sources],
        "problem_count": problems.count,
        "problems": [{name: _plain(value) for name, value in asdict(problem).items()} for problem in problems.first],
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _print_summary(console: Console, read: "Read", summary: "Summary", sequence_length: int) -> None:
    _print_sources(console, read.sources)
    learned = f"{summary.targets} learned ({summary.targets_share:.1%})"
    _print(console, f"{_count(summary.samples, 'sample')}, {_count(summary.tokens, 'token')}, {learned}")
    if summary.samples:
        names = {0: "shortest", 50: "median", 100: "longest"}
        lengths = (f"{names.get(share, f'{share} %')} {length}" for share, length in summary.lengths.items())
        _print(console, f"lengths: {', '.join(lengths)}")
        rows = f"{_count(summary.rows, 'row')} of {sequence_length} tokens"
        _print(console, f"packed: {rows}, {summary.packing_efficiency:.1%} full")
    fate = {name: getattr(summary, name) for name in ("dropped", "truncated", "split")}
    fates = "".join(f", {number} {name}" for name, number in fate.items() if number)
    _print(console, f"longer than {sequence_length} tokens: {summary.overlong}{fates}")
    _print(console, f"fingerprint: {summary.fingerprint}")


def _print_sources(console: Console, sources: "Sequence[Source]") -> None:
    for source in sources:
        _print(console, f"{source.path}  {source.format or 'of no known format'}  {_count(source.records, 'record')}")


def _print_problems(console: Console, log: "ProblemLog") -> None:
    if log.count:
        _print(console, f"\n{_count(log.count, 'problem')}")
    for problem in log.first:
        _print(console, str(problem))


def _print_sample(console: Console, shown: "Shown") -> None:
    """In colours on a terminal, in brackets elsewhere."""
    sample = shown.sample
    where = f"{shown.path}:{sample.line}"
    _print(console, f"\n{where}  {_count(len(sample.ids), 'token')}, {sample.targets} learned")
    text = Text()
    for piece, learned in shown.pieces:
        if learned and not console.is_terminal:
            text.append(f"{BEGIN}{_visible(piece)}{END}")
        else:
            text.append(_visible(piece), LEARNED_STYLE if learned else "dim")
    console.print(text, soft_wrap=True)


def _print(console: Console, line: str) -> None:
    console.print(Text(_visible(line)), soft_wrap=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _visible(text: str) -> str:
    """The text with its control characters written out: data shall not steer the terminal."""
    return "".join(
        repr(char)[1:-1] if char not in "\n\t" and unicodedata.category(char) in CONTROL else char for char in text
    )
