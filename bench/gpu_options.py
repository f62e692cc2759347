"""The command line of the benchmark on a GPU."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

from bench.gpu_ceilings import COPY_BYTES, SIDE
from bench.options import unwritable
from bench.random_checkpoint import Size, raw_config

PROGRAM = "python -m bench.gpu"
OUTPUT = Path("bench/results/gpu.json")
LONG_BATCHES = (1, 8)
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """A run, or a merge, that was asked for."""

    device: str
    size: Size
    layers: int | None  # None: all
    batches: tuple[int, ...]
    prompt_tokens: int
    long: int | None  # tokens of the long prompts
    decode_tokens: int
    repeats: int
    seed: int
    name: str  # of Shoal, in the table
    transformers: bool
    limit_s: float | None
    copy_bytes: int
    side: int
    commit: str | None
    output: Path
    merge: tuple[Path, ...]
    report: bool

    @property
    def workloads(self) -> tuple[tuple[int, int], ...]:
        """(batch, prompt tokens), those with the fewest tokens first."""
        asked = {(batch, self.prompt_tokens) for batch in self.batches}
        if self.long is not None:
            asked |= {(batch, self.long) for batch in LONG_BATCHES}
        return tuple(sorted(asked, key=lambda each: (each[0] * each[1], each)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options of a command line; a wrong one ends the process with status 2 and a line that says why."""
    parser = _parser()
    raw = parser.parse_args(arguments)
    if raw.transformers and raw.merge:
        parser.error("--transformers is for a run: leave --merge out")
    try:
        raw_config(raw.size, raw.layers)
    except ValueError as error:
        parser.error(f"--layers: {error}")
    if reason := unwritable(raw.output):
        parser.error(f"--output {raw.output}: {reason}; expected a JSON file that can be written")
    return Options(
        device=raw.device,
        size=raw.size,
        layers=raw.layers,
        batches=tuple(sorted(set(raw.batches))),
        prompt_tokens=raw.prompt_tokens,
        long=raw.long or None,
        decode_tokens=raw.decode_tokens,
        repeats=raw.repeats,
        seed=raw.seed,
        name=raw.name,
        transformers=raw.transformers,
        limit_s=raw.limit_s,
        copy_bytes=raw.copy_mib * MIB,
        side=raw.side,
        commit=raw.commit,
        output=raw.output,
        merge=tuple(raw.merge or ()),
        report=raw.report,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(PROGRAM, description="Measure Shoal on one GPU, with random weights of DeepSeek-V2-Lite's shape.")
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda; cpu shows that it works")
    add("--size", choices=get_args(Size), default="v2-lite", help="of the model (default v2-lite; scaled: for tests)")
    add("--layers", type=_count, metavar="N", help="the first N layers alone")
    add("--batches", type=_count, nargs="+", default=(1, 8, 32, 128), metavar="B", help="prompts at once (1 8 32 128)")
    add("--prompt-tokens", type=_count, default=1024, metavar="N", help="of each prompt (1024)")
    long = f"tokens of long prompts, {' and '.join(map(str, LONG_BATCHES))} at once (8192; 0: none)"
    add("--long", type=_none_or_count, default=8192, metavar="N", help=long)
    add("--decode-tokens", type=_count, default=64, metavar="N", help="of each sequence (64)")
    add("--repeats", type=_count, default=3, metavar="N", help="of each workload, after one that does not count (3)")
    add("--seed", type=int, default=0, metavar="S", help="of weights and prompts (0)")
    add("--name", default="shoal", metavar="NAME", help="what the table calls this run (shoal)")
    add("--transformers", action="store_true", help="measure transformers, too, when Shoal is through")
    add("--limit-s", type=float, metavar="S", help="begin no further workload after so many seconds")
    add("--copy-mib", type=_count, default=COPY_BYTES // MIB, metavar="N", help=f"of the copy ({COPY_BYTES // MIB})")
    add("--side", type=_count, default=SIDE, metavar="N", help=f"of the square matrix product ({SIDE})")
    add("--commit", metavar="HASH", help="that is measured, where the checkout has no history")
    add("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"JSON ({OUTPUT})")
    add("--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing; write these files' runs as one")
    add("--report", action="store_true", help="write the table into README.md, too")
    return parser


def _count(text: str) -> int:
    number = _none_or_count(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return number


def _none_or_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)
