"""Decode steps as CUDA graphs: one launch for what would be hundreds, where nothing of a step needs the host.

A graph computes what the step itself would, kernel by kernel, so its bits are the same. It is recorded for a number of
sequences and a length of block table, both rounded up; what fills it up are rows of a block that no sequence owns.
Shapes: `T` tokens, one a sequence, `M` blocks of a table, `V` vocabulary.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attention.batch import StepBatch
from attention.cache import LatentCache
from attention.decoder import Decoder

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

MOST_ROWS = 256  # of a step that is worth a graph
TABLE_TOKENS = 256  # least that a recorded block table reaches


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: StepBatch  # read when it is replayed
    logits_TV: Tensor  # written then


class StepGraphs:
    """The graphs of one decoder and cache, recorded when a step first wants one."""

    def __init__(self, decoder: Decoder, cache: LatentCache, spare_block: int, most_blocks: int) -> None:
        """`spare_block` is written to by rows that nobody wants; `most_blocks` is the longest table's."""
        self._decoder = decoder
        self._cache = cache
        self._spare = spare_block
        self._most_blocks = most_blocks
        self._version: object = None  # of the hosts at the last step
        self._stream: torch.cuda.Stream | None = None
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._pool: _POOL_HANDLE | None = None

    def forward(self, batch: StepBatch) -> Tensor | None:
        """Logits [T, V] of a step with one token a sequence, all of which want them; good until the next call.

        None where such a step cannot be recorded just now.
        """
        tokens = len(batch)
        hosts = self._decoder.near_hosts()
        if hosts is None or tokens > MOST_ROWS:
            return None
        with hosts.computing():  # nothing is loaded or dropped before it is replayed, nor freed before it is computed
            version = hosts.version
            if version != self._version:  # experts move, perhaps more of them before the next step
                self._recorded.clear()
                self._pool = None
                self._version = version
                return None
            if version is None:
                return None
            key = (_rounded(tokens, 1), self._table_blocks(batch.block_tables_QM.shape[1]))
            if key not in self._recorded:
                self._recorded[key] = self._record(*key)
            recorded = self._recorded[key]
            self._fill(recorded.batch, batch)
            recorded.graph.replay()
        return recorded.logits_TV[:tokens]

    def _table_blocks(self, blocks: int) -> int:
        least = -(-TABLE_TOKENS // self._cache.block_size)
        return min(_rounded(blocks, least), max(blocks, self._most_blocks))

    def _fill(self, into: StepBatch, batch: StepBatch) -> None:
        tokens, blocks = len(batch), batch.block_tables_QM.shape[1]
        for name in ("token_T", "position_T", "slot_T", "cos_TR", "sin_TR"):
            getattr(into, name)[:tokens].copy_(getattr(batch, name))
        into.block_tables_QM[:tokens, :blocks].copy_(batch.block_tables_QM)
        if tokens < len(into):  # of whom an earlier step may have left something
            into.slot_T[tokens:].fill_(self._spare * self._cache.block_size)
            into.position_T[tokens:].zero_()

    def _record(self, rows: int, blocks: int) -> _Recorded:
        device = self._cache.data_LBSW.device
        half = self._decoder.config.qk_rope_head_dim // 2
        numbers = torch.arange(rows, device=device)
        batch = StepBatch(
            token_T=torch.zeros_like(numbers),
            position_T=torch.zeros_like(numbers, dtype=torch.int32),
            sequence_T=numbers.int(),
            slot_T=torch.full_like(numbers, self._spare * self._cache.block_size),
            block_tables_QM=torch.full((rows, blocks), self._spare, dtype=torch.int32, device=device),
            logit_row_L=numbers,
            cos_TR=torch.ones(rows, half, device=device),
            sin_TR=torch.zeros(rows, half, device=device),
        )
        assert all(getattr(batch, field.name).is_cuda for field in fields(batch))
        if self._stream is None:  # memory of the pool is used again on its own stream alone
            self._stream = torch.cuda.Stream(device)
        beside = self._stream
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            self._decoder.forward(batch, self._cache)  # compiles what is not compiled, into the spare block
        torch.cuda.current_stream(device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
            logits_TV = self._decoder.forward(batch, self._cache)
        return _Recorded(graph, batch, logits_TV)


def _rounded(count: int, least: int) -> int:
    """The smallest of least, 2 · least, 4 · least ... that is at least `count`."""
    size = least
    while size < count:
        size *= 2
    return size
