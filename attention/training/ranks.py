"""What training workers do together; each call is made by all of them, in the same order."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_NUMBERS = 1 << 24  # sent at once


class Ranks(Protocol):
    """The workers of a run."""

    rank: int
    world: int

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each fp32 tensor by its sum over the workers: the same bits on every one."""

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        """Replace each fp32 tensor by the source's."""

    def gather(self, message: str) -> list[str]:
        """Every worker's message, in rank order."""


class OneRank:
    """A run of one worker."""

    rank = 0
    world = 1

    def sum(self, tensors: Sequence[Tensor]) -> None:
        pass

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        pass

    def gather(self, message: str) -> list[str]:
        return [message]


class DistributedRanks:
    """Over torch.distributed, whose process group exists already."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        _in_buckets(tensors, dist.all_reduce)

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        _in_buckets(tensors, lambda flat: dist.broadcast(flat, source))

    def gather(self, message: str) -> list[str]:
        data = torch.from_numpy(np.frombuffer(message.encode(), np.uint8).copy())
        length = torch.tensor([len(data)])
        lengths = [torch.zeros_like(length) for _ in range(self.world)]
        dist.all_gather(lengths, length)
        width = max(int(each) for each in lengths)
        padded = torch.zeros(width, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.zeros_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [bytes(part[: int(each)].numpy()).decode() for part, each in zip(parts, lengths, strict=True)]


def _in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Each call costs a round of all workers, so small tensors go together."""
    bucket: list[Tensor] = []
    numbers = 0
    for place, tensor in enumerate(tensors, 1):
        bucket.append(tensor)
        numbers += tensor.numel()
        if numbers >= BUCKET_NUMBERS or place == len(tensors):
            _as_one(bucket, collective)
            bucket, numbers = [], 0


def _as_one(bucket: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        collective(bucket[0])
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    collective(flat)
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))
