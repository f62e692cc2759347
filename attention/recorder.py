"""What a GPU computes as CUDA graphs: recorded once, launched as one from then on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """`replay` computes again, from what lies where it lay; `out` is written then."""

    replay: Callable[[], None]
    out: Tensor


class Recorder:
    """Graphs that share their memory: one is replayed at a time, and its result is good until the next is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: _POOL_HANDLE | None = None

    def record(self, compute: Callable[[], Tensor]) -> Recorded:
        """Calls `compute` twice: it compiles what is not compiled, and is recorded then.

        The second time, nothing in it may wait for the device. Raises what `compute` raises, and
        torch.OutOfMemoryError where the device's memory is too small.
        """
        if self._stream is None:  # memory of the pool is used again on its own stream alone
            self._stream = torch.cuda.Stream(self._device)
        beside = self._stream
        beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(beside):
            compute()
        torch.cuda.current_stream(self._device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
            out = compute()
        return Recorded(graph.replay, out)

    def forget(self) -> None:
        """What was recorded is replayed no more: what comes has memory of its own."""
        self._pool = None
