"""`shoal bench`: the benchmark is a program of its own, with options of its own, and takes this process over."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

NAME = "bench"
HELP = "Measure Shoal and transformers side by side (`shoal bench --help`)."


def run_bench(arguments: Sequence[str]) -> NoReturn:
    """Become `python -m bench ARGUMENTS...`."""
    os.execv(sys.executable, [sys.executable, "-m", "bench", *arguments])
