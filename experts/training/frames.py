"""Backward requests and replies on a byte stream: a checked header, then tensors as they lie in memory, or where.

Header, little-endian, 72 bytes: magic, version, kind, layer, generation, step, correlation id, micro-batch, rank, rows,
pairs, hidden, payload bytes, CRC-32 over all else. The payload of a request is x, dout, and of the pairs the weights,
rows, experts and whether each is answered; of a reply dx and dweight; of a refusal its code, a newline and its message;
of a request whose tensors lie in memory that both ends map, the address, and of its reply nothing.
Sizes are checked against caps and the payload's true length before a tensor is made.
"""

import mmap
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from experts.errors import FrameError, HostRefused
from experts.frames import (
    MAX_HIDDEN,
    MAX_PAIRS,
    MAX_PAYLOAD_BYTES,
    MAX_ROWS,
    parse_refusal,
    refusal_payload,
    tensor_bytes,
)
from experts.training.messages import BackwardReply, BackwardRequest

MAGIC = b"SHTR"
VERSION = 2
HEADER = struct.Struct("<4sHHIQQQIIIIIQI4x")
CRC = struct.Struct("<I")
CRC_AT = HEADER.size - 8
BACKWARD, REPLY, REFUSAL, SHARED, SHARED_REPLY = 1, 2, 3, 4, 5
MAX_ADDRESS_BYTES = 256
NUMBER = 4  # bytes of every number


class Header(NamedTuple):
    """`rows`, `pairs` and `hidden` count numbers, `payload` bytes."""

    kind: int
    layer: int
    generation: int
    step: int
    correlation: int
    micro: int
    rank: int
    rows: int
    pairs: int
    hidden: int
    payload: int

    @property
    def numbers(self) -> int:
        """Numbers that the payload of a request or a reply must have."""
        if self.kind == BACKWARD:
            return 2 * self.rows * self.hidden + 4 * self.pairs
        return self.pairs * (self.hidden + 1)


@dataclass(frozen=True, slots=True)
class SharedAnswer:
    """How much was answered in a block that both ends map (`experts/training/blocks.py`)."""

    generation: int
    pairs: int
    hidden: int


def encode_request(request: BackwardRequest, correlation: int) -> bytes:
    """Raises FrameError when it is over a cap."""
    tensors = (request.x_RD, request.dout_RD, request.pair_weight_P)
    indices = (request.pair_row_P, request.pair_expert_P, request.answer_P)
    header = _request_header(BACKWARD, request, correlation)
    header = header._replace(payload=NUMBER * header.numbers)
    return _assemble(header, [tensor_bytes(tensor) for tensor in (*tensors, *indices)])


def encode_shared(request: BackwardRequest, address: str, correlation: int) -> bytes:
    """A request whose tensors lie in the block at `address`; raises FrameError when it is over a cap."""
    where = address.encode()
    header = _request_header(SHARED, request, correlation)._replace(payload=len(where))
    return _assemble(header, [memoryview(where)])


def _request_header(kind: int, request: BackwardRequest, correlation: int) -> Header:
    """But for the bytes of its payload."""
    rows, hidden = request.x_RD.shape
    pairs = len(request.pair_row_P)
    place = (request.layer, request.generation, request.step, correlation, request.micro, request.rank)
    return Header(kind, *place, rows, pairs, hidden, 0)


def encode_shared_reply(reply: BackwardReply, correlation: int) -> bytes:
    """A reply whose tensors lie in the request's block."""
    pairs, hidden = reply.dx_AD.shape
    return _assemble(Header(SHARED_REPLY, 0, reply.generation, 0, correlation, 0, 0, 0, pairs, hidden, 0), [])


def shared_address(frame: bytes) -> str:
    """The block of a shared request, whose frame was checked."""
    return frame[HEADER.size :].decode(errors="replace")


def encode_reply(reply: BackwardReply, correlation: int) -> bytes:
    """Raises FrameError when it is over a cap."""
    pairs, hidden = reply.dx_AD.shape
    size = NUMBER * pairs * (hidden + 1)
    header = Header(REPLY, 0, reply.generation, 0, correlation, 0, 0, 0, pairs, hidden, size)
    return _assemble(header, [tensor_bytes(reply.dx_AD), tensor_bytes(reply.dweight_A)])


def encode_refusal(refusal: HostRefused, correlation: int) -> bytes:
    payload = refusal_payload(refusal)
    return _assemble(Header(REFUSAL, 0, 0, 0, correlation, 0, 0, 0, 0, 0, len(payload)), [memoryview(payload)])


def decode_header(frame: bytes) -> Header:
    """Check a frame, all of it; raises FrameError naming what is wrong."""
    if len(frame) < HEADER.size:
        raise FrameError(f"{len(frame)} bytes are too few for a frame of at least {HEADER.size}")
    magic, version, *fields, crc = HEADER.unpack_from(frame)
    header = Header._make(fields)
    if magic != MAGIC:
        raise FrameError(f"magic is {magic!r}; expected {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame version is {version}; this build speaks {VERSION}")
    if not BACKWARD <= header.kind <= SHARED_REPLY:
        raise FrameError(f"frame kind is {header.kind}; expected {BACKWARD} to {SHARED_REPLY}")
    _check_caps(header)
    if header.payload != len(frame) - HEADER.size:
        raise FrameError(f"the header claims {header.payload} payload bytes; {len(frame) - HEADER.size} came")
    if header.kind in (BACKWARD, REPLY) and header.payload != NUMBER * header.numbers:
        raise FrameError(f"{header} needs {NUMBER * header.numbers} payload bytes")
    if header.kind in (SHARED, SHARED_REPLY) and header.payload > MAX_ADDRESS_BYTES * (header.kind == SHARED):
        raise FrameError(f"{header} has no room for {header.payload} payload bytes")
    if _crc(memoryview(frame)[:CRC_AT], [memoryview(frame)[HEADER.size :]]) != crc:
        raise FrameError("the checksum does not fit the frame: it was damaged on the way")
    return header


def decode_request(header: Header, frame: bytes) -> BackwardRequest:
    """The request in a frame whose header was checked; raises FrameError when it is none."""
    if header.kind != BACKWARD:
        raise FrameError(f"frame kind is {header.kind}; expected {BACKWARD}, a backward request")
    return request_in(header, bytearray(memoryview(frame)[HEADER.size :]))  # torch wants writable memory, aligned


def request_in(header: Header, memory: bytearray | mmap.mmap) -> BackwardRequest:
    """The request whose tensors lie in memory; x, dout and weights are views of it, and the rest is read once.

    Raises FrameError when it is none.
    """
    rows, hidden, pairs = header.rows, header.hidden, header.pairs
    numbers = rows * hidden
    at = 2 * numbers
    floats = np.frombuffer(memory, "<f4")
    columns = np.frombuffer(memory, "<i4", 3 * pairs, NUMBER * (at + pairs)).copy().reshape(3, pairs)
    row_P, expert_P, answer_P = map(torch.from_numpy, columns)
    if ((answer_P != 0) & (answer_P != 1)).any():
        raise FrameError("a pair is to be answered neither 0 nor 1 times")
    return BackwardRequest(
        generation=header.generation,
        step=header.step,
        micro=header.micro,
        rank=header.rank,
        layer=header.layer,
        x_RD=torch.from_numpy(floats[:numbers]).view(rows, hidden),
        dout_RD=torch.from_numpy(floats[numbers:at]).view(rows, hidden),
        pair_row_P=row_P,
        pair_expert_P=expert_P,
        pair_weight_P=torch.from_numpy(floats[at : at + pairs]),
        answer_P=answer_P,
    )


def decode_answer(frame: bytes) -> tuple[int, Callable[[], BackwardReply | SharedAnswer]]:
    """Correlation id, and what gives the reply or raises HostRefused or FrameError; raises FrameError for no frame."""
    header = decode_header(frame)

    def read() -> BackwardReply | SharedAnswer:
        if header.kind == SHARED_REPLY:
            return SharedAnswer(header.generation, header.pairs, header.hidden)
        if header.kind == REFUSAL:
            raise parse_refusal(frame[HEADER.size :])
        if header.kind != REPLY:
            raise FrameError(f"frame kind is {header.kind}; expected {REPLY}, a reply")
        numbers = header.pairs * header.hidden
        floats = torch.from_numpy(np.frombuffer(bytearray(memoryview(frame)[HEADER.size :]), "<f4"))
        return BackwardReply(header.generation, floats[:numbers].view(header.pairs, header.hidden), floats[numbers:])

    return header.correlation, read


def _check_caps(header: Header) -> None:
    over = (
        header.rows > MAX_ROWS
        or header.pairs > MAX_PAIRS
        or header.hidden > MAX_HIDDEN
        or header.payload > MAX_PAYLOAD_BYTES
    )
    if over:
        raise FrameError(f"{header} is over the caps of a frame: use smaller micro-batches")


def _assemble(header: Header, payload: list[memoryview]) -> bytes:
    _check_caps(header)
    head = bytearray(HEADER.size)
    HEADER.pack_into(head, 0, MAGIC, VERSION, *header, 0)
    CRC.pack_into(head, CRC_AT, _crc(memoryview(head)[:CRC_AT], payload))
    return b"".join((head, *payload))


def _crc(head: memoryview, payload: list[memoryview]) -> int:
    found = zlib.crc32(head)
    for part in payload:
        found = zlib.crc32(part, found)
    return found
