"""The command line of the benchmark."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.results import BASELINE, LOCAL
from cluster.threads import node_threads

CHECKPOINT = Path("models/bench")
OUTPUT = Path("bench/results/latest.json")
QUICK_OUTPUT = Path("bench/results/quick.json")
CONTENDERS = (BASELINE, LOCAL, "shoal-1", "shoal-2", "shoal-4")
QUICK_CONTENDERS = (BASELINE, LOCAL, "shoal-2")
EPILOG = """\
contenders:
  transformers   prefill and decode forwards in one process, with its fastest implementations on this machine
  shoal-local    Shoal in one process, without Ray
  shoal-N        `shoal serve` with one attention worker and N expert actors, through the worker's own door
"""


@dataclass(frozen=True, slots=True)
class Options:
    """A run that was asked for."""

    checkpoint: Path
    output: Path
    contenders: tuple[str, ...]
    batches: tuple[int, ...]
    repeats: int
    seed: int
    threads: int  # of transformers and of shoal-local
    service_threads: int | None  # of each actor; None: the service's default
    prompt_tokens: int
    decode_tokens: int
    quick: bool
    report: bool
    training: bool


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options of a command line; a wrong one ends the process with status 2 and a message."""
    parser = _parser()
    raw = parser.parse_args(arguments)
    if raw.quick and raw.report:
        parser.error("--report is for a whole run: leave --quick out")
    if unknown := [name for name in raw.contenders or () if service_hosts(name) is None and name not in CONTENDERS]:
        parser.error(f"--contenders {unknown[0]}: use {', '.join(CONTENDERS)}, or shoal-N for any N")
    output: Path = raw.output or (QUICK_OUTPUT if raw.quick else OUTPUT)
    if reason := unwritable(output):  # which is written last
        parser.error(f"--output {output}: {reason}; expected a JSON file that can be written")
    return Options(
        checkpoint=raw.checkpoint,
        output=output,
        contenders=raw.contenders or (QUICK_CONTENDERS if raw.quick else CONTENDERS),
        batches=raw.batch or ((1, 8) if raw.quick else (1, 8, 32)),
        repeats=raw.repeats or (1 if raw.quick else 5),
        seed=raw.seed,
        threads=raw.threads or node_threads(),
        service_threads=raw.threads,
        prompt_tokens=128,
        decode_tokens=8 if raw.quick else 32,
        quick=raw.quick,
        report=raw.report,
        training=raw.training,
    )


def service_hosts(contender: str) -> int | None:
    """Expert actors of a `shoal-N`; None for another contender."""
    prefix, _, count = contender.partition("-")
    return int(count) if prefix == "shoal" and count.isdecimal() and int(count) > 0 else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "shoal bench",
        description="Measure Shoal and transformers side by side on one checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=CHECKPOINT,
        metavar="DIR",
        help=f"default {CHECKPOINT}, which is written when it is missing: 3.4 GB",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"JSON (default {OUTPUT}, quick: {QUICK_OUTPUT})")
    parser.add_argument("--contenders", type=_names, metavar="A,B", help=f"default {','.join(CONTENDERS)}, in one run")
    parser.add_argument("--batch", type=_counts, metavar="B,B", help="sequences at once (default 1,8,32; quick: 1,8)")
    parser.add_argument("--repeats", type=_count, metavar="N", help="of everything (default 5; quick: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the prompts (default 0)")
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="of every process that computes (default: as each is by default)"
    )
    parser.add_argument(
        "--training", action=argparse.BooleanOptionalAction, default=True, help="fine-tuning, too (5 minutes a repeat)"
    )
    parser.add_argument("--quick", action="store_true", help="see that it works: few tokens, one repeat, no claim")
    parser.add_argument("--report", action="store_true", help="write README's table and the plots of docs/, too")
    return parser


def unwritable(file: Path) -> str | None:
    """Why a file cannot be written, in directories that are made for it; None when it can."""
    if file.is_dir():
        return "it is a directory"
    there = file if file.exists() else next(parent for parent in file.absolute().parents if parent.exists())
    if there != file and not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK) else f"{there} is read-only"


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names nobody")
    return names


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part) for part in text.split(",")}))
