"""`python -m tests.simulation --seeds 1000`: run seeds, and say which fail and how to replay them."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.simulation.many import run_seeds
from tests.simulation.reference import open_references, write_models
from tests.simulation.run import simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="print what happened, with --seed")
    parser.add_argument("--deadline", type=float, help="seconds after which clients of the hosts give up")
    parser.add_argument("--processes", type=int, help="as many as there are cores")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        models = Path(directory)
        write_models(models)
        if args.seed is not None:
            outcome = simulate(args.seed, open_references(models), args.deadline)
            print("\n".join(outcome.lines() if args.trace else ()))
            print(f"seed {args.seed}: {outcome.failure or 'fine'} (trace {outcome.digest})")
            return outcome.failure is not None
        started_s = time.monotonic()
        failures: dict[int, str] = {}
        done = 0
        for part in run_seeds(models, range(args.first, args.first + args.seeds), args.deadline, args.processes):
            done += part.seeds
            failures |= part.failures
            for seed, failure in part.failures.items():
                print(f"seed {seed}: {failure.strip().splitlines()[-1]}", flush=True)
            took_s = time.monotonic() - started_s
            print(f"{done} of {args.seeds} seeds, {len(failures)} failed, {took_s:.0f} s", file=sys.stderr, flush=True)
    if failures:
        again = "" if args.deadline is None else f" --deadline {args.deadline}"
        print(f"{len(failures)} of {done} seeds failed: {sorted(failures)}")
        print(f"replay: python -m tests.simulation --seed {min(failures)} --trace{again}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
