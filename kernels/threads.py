"""How many threads a process computes with."""

import torch

from kernels.native import native

SPIN_NS = 20_000
"""How long a thread of the team looks for more work before it sleeps: longer than the Python between two kernels of a
layer, shorter than what a neighbour on the same core would notice."""


def set_threads(threads: int) -> None:
    """One budget for the native kernels and for torch; raises ValueError below 1."""
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    torch.set_num_threads(threads)
    library = native()
    if library is not None:
        library.shoal_set_threads(threads, SPIN_NS)
