"""Memory that both ends map, for the tensors of backward calls within one machine: frames then say where it is.

A call's block has what is asked (x, dout, the pairs' weights, rows, experts and whether each is answered), then room
for what is answered (dx and dweight). What decides which memory is touched is read once, into the reader's own.
"""

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.errors import FrameError, HostRefused
from experts.grpc_stream import StreamCall
from experts.shared_memory import SharedMemory, map_shared
from experts.training.frames import NUMBER, SharedAnswer
from experts.training.messages import BackwardReply, BackwardRequest
from experts.training.peer import PendingGradients

LEAST_BYTES = 1 << 16  # smaller calls travel in their frames
GRAIN_BYTES = 1 << 20  # blocks are multiples of it, so that they fit the next call, too
Call = StreamCall[BackwardReply | SharedAnswer]
KEPT = 4  # blocks of a client that wait to be used again, and of a stream that stay mapped


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a call's tensors lie, in numbers."""

    rows: int
    hidden: int
    pairs: int

    @property
    def asked(self) -> int:
        return 2 * self.rows * self.hidden + 4 * self.pairs

    @property
    def nbytes(self) -> int:
        """With room for an answer to every pair."""
        return NUMBER * (self.asked + self.pairs * (self.hidden + 1))

    def write(self, memory: mmap.mmap, request: BackwardRequest) -> None:
        floats, ints = torch.frombuffer(memory, dtype=torch.float32), torch.frombuffer(memory, dtype=torch.int32)
        numbers, pairs = self.rows * self.hidden, self.pairs
        floats[:numbers].view(self.rows, self.hidden).copy_(request.x_RD)
        floats[numbers : 2 * numbers].view(self.rows, self.hidden).copy_(request.dout_RD)
        at = 2 * numbers
        floats[at : at + pairs] = request.pair_weight_P
        for place, column in enumerate((request.pair_row_P, request.pair_expert_P, request.answer_P), start=1):
            ints[at + place * pairs : at + (place + 1) * pairs] = column

    def answer(self, memory: mmap.mmap, answered: int) -> tuple[Tensor, Tensor]:
        """Where dx [A, D] and dweight [A] of so many answered pairs belong."""
        room = torch.frombuffer(memory, dtype=torch.float32)[self.asked :]
        numbers = answered * self.hidden
        return room[:numbers].view(answered, self.hidden), room[numbers : numbers + answered]


def layout_of(request: BackwardRequest) -> Layout:
    rows, hidden = request.x_RD.shape
    return Layout(rows, hidden, len(request.pair_row_P))


class Blocks:
    """A client's blocks, used again and again. Several threads may take."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[SharedMemory] = []
        self._closed = False

    def take(self, nbytes: int) -> SharedMemory:
        """Raises OSError where the system gives none."""
        with self._lock:
            for place, block in enumerate(self._free):
                if len(block.memory) >= nbytes:
                    return self._free.pop(place)
            if len(self._free) >= KEPT:
                self._free.pop(0).close()
        return SharedMemory(-(-max(1, nbytes) // GRAIN_BYTES) * GRAIN_BYTES)

    def give_back(self, block: SharedMemory) -> None:
        """Nobody reads it any more, here or at the host."""
        with self._lock:
            if len(self._free) < KEPT and not self._closed:
                self._free.append(block)
                return
        block.close()

    def close(self) -> None:
        with self._lock:
            free, self._free, self._closed = self._free, [], True
        for block in free:
            block.close()


class PlainCall:
    """A PendingGradients whose tensors travel in frames."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def result(self, timeout_s: float) -> BackwardReply:
        answer = self._call.result(timeout_s)
        if not isinstance(answer, BackwardReply):
            raise FrameError("an answer in shared memory came to a request that named none")
        return answer

    def release(self) -> None:
        pass  # the reply owns its memory


class SharedCall:
    """A PendingGradients whose tensors lie in a block."""

    def __init__(
        self,
        call: Call,
        layout: Layout,
        block: SharedMemory,
        blocks: Blocks,
        in_frames: Callable[[], PendingGradients],
    ) -> None:
        """`in_frames` sends the same without a block."""
        self._call = call
        self._layout = layout
        self._block: SharedMemory | None = block
        self._blocks = blocks
        self._in_frames = in_frames
        self._plain: PendingGradients | None = None
        self._answered = False

    def result(self, timeout_s: float) -> BackwardReply:
        """The reply, whose tensors are views of memory that `release` gives back. See `PendingGradients.result`."""
        if self._plain is not None:
            return self._plain.result(timeout_s)
        try:
            answer = self._call.result(timeout_s)
        except HostRefused as refusal:
            self._answered = True
            if refusal.code != "unreachable":
                raise
            self._plain = self._in_frames()
            return self._plain.result(timeout_s)
        assert self._block is not None, "a reply that was released is asked for"
        self._answered = True
        if isinstance(answer, BackwardReply):
            raise FrameError("an answer came in a frame to a request in shared memory")
        if answer.pairs > self._layout.pairs or answer.hidden != self._layout.hidden:
            raise FrameError(f"{answer} came for {self._layout}")
        return BackwardReply(answer.generation, *self._layout.answer(self._block.memory, answer.pairs))

    def release(self) -> None:
        """The block may be used again, unless a late answer may still be written to it. Twice is once."""
        block, self._block = self._block, None
        if block is None:
            return
        if self._answered:
            self._blocks.give_back(block)
        else:
            block.close()


class Mapped:
    """A stream's view of its client's blocks."""

    def __init__(self) -> None:
        self._memory: dict[str, mmap.mmap] = {}

    def at(self, address: str, nbytes: int) -> mmap.mmap:
        """Raises HostRefused as `unreachable` where it cannot be mapped here, and FrameError for what is no address."""
        known = self._memory.pop(address, None)
        try:
            memory = known if known is not None and len(known) >= nbytes else map_shared(address, nbytes)
        except ValueError as error:
            raise FrameError(str(error)) from error
        if memory is None:
            raise HostRefused("unreachable", "the memory that was offered cannot be mapped here")
        self._memory[address] = memory
        while len(self._memory) > KEPT:
            self._memory.pop(next(iter(self._memory)))
        return memory
