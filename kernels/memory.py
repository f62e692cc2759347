"""Memory for weights that are read from end to end: in huge pages where the system grants them.

With ordinary pages a stream stops at each 4 KiB to translate the next address; at few rows, where reading weights is
all there is to do, huge pages are worth having.
"""

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_BYTES = 2 << 20


def weight_memory(numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[numbers] of `dtype`, undefined; small memory comes from torch."""
    size = numbers * dtype.itemsize
    if size < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(numbers, dtype=dtype)
    region = mmap.mmap(-1, size + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(region, dtype=dtype)
    start = -whole.data_ptr() % HUGE_BYTES
    with contextlib.suppress(OSError):  # a kernel without them
        # only what fills huge pages: the rest must not take one more
        region.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_BYTES * HUGE_BYTES)
    return whole[start // dtype.itemsize : start // dtype.itemsize + numbers]
