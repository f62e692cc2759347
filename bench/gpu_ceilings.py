"""What a device can do at most: bytes that a large copy moves a second, FLOP/s of a large product in bf16."""

import itertools
from collections.abc import Callable

import torch

from bench.child import now_s
from bench.gpu_results import Ceilings
from bench.spread import spread

COPY_BYTES = 4 << 30  # far more than any cache holds
SIDE = 8192
REPEATS = 20
WARM_UPS = 5


def measure_ceilings(device: str, copy_bytes: int = COPY_BYTES, side: int = SIDE, repeats: int = REPEATS) -> Ceilings:
    """Of random numbers: products of zeros take less power, and are faster."""
    source = torch.empty(copy_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()  # each byte is read and written
    copies_s = seconds(device, lambda: target.copy_(source), repeats)
    left, right = (torch.empty(side, side, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    out = torch.empty_like(left)
    products_s = seconds(device, lambda: torch.mm(left, right, out=out), repeats)
    return Ceilings(
        copy_bytes=moved // 2,
        copy_bytes_per_s=spread([moved / taken_s for taken_s in copies_s]),
        side=side,
        product_flops_per_s=spread([2 * side**3 / taken_s for taken_s in products_s]),
    )


def seconds(device: str, work: Callable[[], object], repeats: int) -> list[float]:
    """How long each of `repeats` runs took, after some that do not count; by the GPU's own clock where there is one."""
    for _ in range(WARM_UPS):
        work()
    if torch.device(device).type != "cuda":
        return [_clocked_s(work) for _ in range(repeats)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [1e-3 * before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def _clocked_s(work: Callable[[], object]) -> float:
    started_s = now_s()
    work()
    return now_s() - started_s
