"""Many seeds, split over processes of one thread each."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tests.simulation.reference import open_references
from tests.simulation.run import simulate

SHARE = 50  # seeds that a process takes at a time


@dataclass(frozen=True, slots=True)
class Part:
    """Some seeds, and why those that failed did."""

    seeds: int
    failures: dict[int, str]


def run_some(models: Path, seeds: range, deadline_s: float | None) -> Part:
    """In this process."""
    outcomes = (simulate(seed, open_references(models), deadline_s) for seed in seeds)
    return Part(len(seeds), {outcome.seed: outcome.failure for outcome in outcomes if outcome.failure is not None})


def run_seeds(
    models: Path, seeds: range, deadline_s: float | None = None, processes: int | None = None
) -> Iterator[Part]:
    """Parts, as they are done."""
    shares = [seeds[start : start + SHARE] for start in range(0, len(seeds), SHARE)]
    count = min(processes or os.cpu_count() or 1, len(shares))
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_some, models, share, deadline_s) for share in shares]
        for future in as_completed(futures):
            yield future.result()
