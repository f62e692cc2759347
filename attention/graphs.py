"""Decode steps as CUDA graphs: one launch for what would be hundreds, where nothing of a step needs the host.

A graph computes what the step itself would, kernel by kernel, so its bits are the same. It is recorded for a number of
sequences and a length of block table, both rounded up; what fills it up are rows of a block that no sequence owns.
Shapes: `T` tokens, one a sequence, `M` blocks of a table, `V` vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.batch import StepBatch
from attention.cache import LatentCache
from attention.decoder import Decoder
from attention.recorder import Recorded, Recorder
from experts.near import NearHosts, Version
from router.placement import Placement

MOST_ROWS = 256  # of a step that is worth a graph
TABLE_TOKENS = 256  # least that a recorded block table reaches


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    batch: StepBatch  # read when it is replayed
    logits: Recorded  # [T, V]


class StepGraphs:
    """The graphs of one decoder and cache, recorded when a step first wants one."""

    def __init__(
        self, decoder: Decoder, cache: LatentCache, spare_block: int, most_blocks: int, recorder: Recorder
    ) -> None:
        """`spare_block` is written to by rows that nobody wants; `most_blocks` is the longest table's."""
        self._decoder = decoder
        self._cache = cache
        self._spare = spare_block
        self._most_blocks = most_blocks
        self._recorder = recorder
        self._hosts: NearHosts | None = None  # of the last step: graphs read what these keep on the device
        self._version: Version | None = None
        self._steps: dict[tuple[int, int], _Step] = {}
        self._full = False  # the device has no room for one more

    def forward(self, batch: StepBatch) -> Tensor | None:
        """Logits [T, V] of a step with one token a sequence, all of which want them; good until the next call.

        None where such a step cannot be recorded just now.
        """
        tokens = len(batch)
        placement = self._decoder.placement()
        hosts = self._decoder.near_hosts(placement)
        if hosts is None:
            self._begin_anew(None, None)
            return None
        if tokens > MOST_ROWS:
            return None
        with hosts.computing():  # nothing is loaded or dropped before it is replayed, nor freed before it is computed
            version = hosts.version
            if hosts is not self._hosts or version != self._version:
                self._begin_anew(hosts, version)  # experts move, perhaps more of them before the next step
                return None
            if version is None:
                return None
            step = self._step(_rounded(tokens, 1), self._table_blocks(batch.block_tables_QM.shape[1]), placement)
            if step is None:
                return None
            self._fill(step.batch, batch)
            step.logits.replay()
        return step.logits.out[:tokens]

    def _begin_anew(self, hosts: NearHosts | None, version: Version | None) -> None:
        self._hosts, self._version, self._full = hosts, version, False
        self._steps.clear()
        self._recorder.forget()

    def _step(self, rows: int, blocks: int, placement: Placement) -> _Step | None:
        """What is recorded for so many rows and blocks; None where it cannot be."""
        found = self._steps.get((rows, blocks))
        # a dispatch that is turned down goes another way, which waits for the device
        if found is not None or self._full or self._hosts is None or not self._hosts.hold(placement):
            return found
        batch = self._filler(rows, blocks)
        try:
            logits = self._recorder.record(lambda: self._decoder.forward(batch, self._cache, placement))
        except torch.OutOfMemoryError:  # what graphs have taken, other steps may need
            self._begin_anew(self._hosts, self._version)
            self._full = True
            return None
        step = self._steps[rows, blocks] = _Step(batch, logits)
        return step

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

    def _filler(self, rows: int, blocks: int) -> StepBatch:
        """A step of rows that nobody wants, in the spare block."""
        device = self._cache.data_LBSW.device
        half = self._decoder.config.qk_rope_head_dim // 2
        numbers = torch.arange(rows, device=device)
        return StepBatch(
            token_T=torch.zeros_like(numbers),
            position_T=torch.zeros_like(numbers, dtype=torch.int32),
            sequence_T=numbers.int(),
            slot_T=torch.full_like(numbers, self._spare * self._cache.block_size),
            block_tables_QM=torch.full((rows, blocks), self._spare, dtype=torch.int32, device=device),
            logit_row_L=numbers,
            cos_TR=torch.ones(rows, half, device=device),
            sin_TR=torch.zeros(rows, half, device=device),
        )


def _rounded(count: int, least: int) -> int:
    """The smallest of least, 2 · least, 4 · least ... that is at least `count`."""
    size = least
    while size < count:
        size *= 2
    return size
