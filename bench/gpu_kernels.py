"""`python -m bench.gpu_kernels`: the kernels of a CUDA device one by one, in every tile that they might have.

Whether all tiles of a product have the same bits comes first. Then each kernel is timed at DeepSeek-V2-Lite's shapes:
calls with so many different weights that no cache has those of the next one, in one graph that is replayed.
`--compile` fills Triton's cache with a part of the candidates, so that several processes can share that work before.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.gpu_ceilings import measure_ceilings
from bench.gpu_kernel_results import KernelResults, plain, tables
from bench.gpu_run import read_device
from bench.machine import read_software
from bench.options import unwritable
from bench.results import write_results

PROGRAM = "python -m bench.gpu_kernels"
OUTPUT = Path("bench/results/gpu_kernels.json")
LIMIT_S = 150.0


@dataclass(frozen=True, slots=True)
class Options:
    """A run that was asked for."""

    limit_s: float
    output: Path
    part: tuple[int, int] | None  # to compile, of so many


def parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(PROGRAM, description="Time the kernels of a CUDA device in all their tiles.")
    add = parser.add_argument
    add("--limit-s", type=float, default=LIMIT_S, metavar="S", help=f"begin nothing after so long ({LIMIT_S:.0f})")
    add("--output", type=Path, default=OUTPUT, metavar="FILE.json", help=f"({OUTPUT})")
    add("--compile", type=_part, metavar="PART/PARTS", help="time nothing; run a part once, of eight 0/8 to 7/8")
    raw = parser.parse_args(arguments)
    if reason := unwritable(raw.output):
        parser.error(f"--output {raw.output}: {reason}; expected a JSON file that can be written")
    return Options(raw.limit_s, raw.output, raw.compile)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not PART/PARTS with a part from 0 to PARTS - 1")
    return int(part), int(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON file, print the tables; the exit status is 1 for what went wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    if not torch.cuda.is_available():
        print(f"{PROGRAM}: torch finds no CUDA device here, and these kernels are for nothing else", file=sys.stderr)
        return 1
    return run(options, " ".join([PROGRAM, *given]))


def run(options: Options, command: str) -> int:
    """What was found is printed, too, when the device gives up on the way."""
    # Triton may be missing where there is no CUDA device
    from bench.gpu_kernel_cases import product_bit_cases, product_cases
    from bench.gpu_kernel_run import KernelBenchmark, compile_part, graph_s
    from bench.gpu_kernel_steps import attention_bit_cases, attention_cases, row_cases

    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:5.0f} s  {text}", flush=True)

    def in_time() -> bool:
        return time.monotonic() - began_s < options.limit_s

    bit_cases = [*product_bit_cases(), *attention_bit_cases()]
    cases = [*product_cases(), *attention_cases(), *row_cases()]
    if options.part is not None:
        compile_part([*bit_cases, *cases], options.part, in_time, say)
        return 0
    empty = KernelResults(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        software=read_software(),
        device=read_device("cuda"),
        ceilings=measure_ceilings("cuda"),
    )
    benchmark = KernelBenchmark(empty, in_time, lambda found: write_results(found, options.output), say)
    try:
        benchmark.compare(bit_cases)
        benchmark.measure(cases, graph_s)
    finally:
        found = benchmark.results
        print("", *map(plain, tables(found)), *found.failures, f"wrote {options.output}", sep="\n\n", flush=True)
    return 0 if found.times else 1


if __name__ == "__main__":
    sys.exit(main())
