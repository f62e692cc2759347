"""Frames: a fixed header, then tensors as they lie in memory. No pickle, nothing trusted before it is checked.

Header, little-endian, 64 bytes: magic, version, kind, layer, epoch, generation, correlation id, rows, pairs, hidden,
payload bytes, coverage, CRC-32, four bytes of nothing. The payload of a request is x, then the pairs' rows, then
their experts; of a reply, y. Every size is checked against its cap and against the payload's true length before a
tensor is made.

`coverage` says what the CRC guards: the header and all of the payload on a byte stream, the header alone in memory
that the peer writes directly (`experts/arena_frames.py`), where the path guards what it carries.
"""

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experts.errors import FrameError, HostRefused
from experts.messages import ForwardReply, ForwardRequest

MAGIC = b"SHOL"
VERSION = 2
HEADER = struct.Struct("<4sHHIQQQIIIIII4x")
CRC = struct.Struct("<I")
CRC_AT = 56  # it guards the bytes before it; on a byte stream also all behind it
MAX_ROWS = 1 << 16
MAX_PAIRS = 1 << 20
MAX_HIDDEN = 1 << 16
MAX_PAYLOAD_BYTES = 1 << 30
MAX_REFUSAL_BYTES = 1 << 16
CAPS = f"{MAX_ROWS} rows, {MAX_PAIRS} pairs, {MAX_HIDDEN} wide, {MAX_PAYLOAD_BYTES} bytes"


class Kind(IntEnum):
    FORWARD = 1
    REPLY = 2
    REFUSAL = 3


class Coverage(IntEnum):
    """What a frame's checksum guards."""

    WHOLE = 0
    HEADER = 1


class Header(NamedTuple):
    """A checked header; `rows`, `pairs` and `hidden` count numbers, `payload` bytes."""

    kind: int
    layer: int
    epoch: int
    generation: int
    correlation: int
    rows: int
    pairs: int
    hidden: int
    payload: int


def request_header(request: ForwardRequest, correlation: int) -> Header:
    """The header of a request's frame."""
    rows, hidden = request.x_RD.shape
    pairs = request.pair_row_P.shape[0]
    size = 4 * (rows * hidden + 2 * pairs)
    return Header(
        Kind.FORWARD, request.layer, request.epoch, request.generation, correlation, rows, pairs, hidden, size
    )


def reply_header(generation: int, pairs: int, hidden: int, correlation: int) -> Header:
    """The header of a reply's frame."""
    return Header(Kind.REPLY, 0, 0, generation, correlation, 0, pairs, hidden, 4 * pairs * hidden)


def refusal_payload(refusal: HostRefused) -> bytes:
    """A refusal's code, a newline, its message."""
    return f"{refusal.code}\n{refusal.message}".encode()[:MAX_REFUSAL_BYTES]


def parse_refusal(payload: bytes) -> HostRefused:
    code, _, message = payload.decode(errors="replace").partition("\n")
    return HostRefused(code, message)


def write_header(
    into: bytearray | memoryview, header: Header, coverage: Coverage, payload: tuple[memoryview, ...] = ()
) -> None:
    """Put a header at the start of `into`, its CRC over `payload` too; raises FrameError when it is over a cap."""
    if _over_caps(header):
        raise FrameError(f"{header} is over the caps of a frame, {CAPS}: send fewer rows at once")
    HEADER.pack_into(into, 0, MAGIC, VERSION, *header, coverage, 0)
    checksum = zlib.crc32(into[:CRC_AT])
    if coverage is Coverage.WHOLE:
        checksum = zlib.crc32(into[CRC_AT + CRC.size : HEADER.size], checksum)
    for part in payload:
        checksum = zlib.crc32(part, checksum)
    CRC.pack_into(into, CRC_AT, checksum)


def parse_header(frame: bytes | memoryview, length: int, coverage: Coverage) -> Header:
    """Check the header and checksum of a frame of `length` bytes; raises FrameError naming what is wrong."""
    if length < HEADER.size:
        raise FrameError(f"{length} bytes are too few for a frame of at least {HEADER.size}")
    fields = HEADER.unpack_from(frame)
    header = Header._make(fields[2:11])
    if fields[0] != MAGIC:
        raise FrameError(f"magic is {fields[0]!r}; expected {MAGIC!r}")
    if fields[1] != VERSION:
        raise FrameError(f"frame version is {fields[1]}; this build speaks {VERSION}")
    if not Kind.FORWARD <= header.kind <= Kind.REFUSAL:
        raise FrameError(f"frame kind is {header.kind}; expected one of {[int(known) for known in Kind]}")
    if fields[11] != coverage:
        raise FrameError(f"checksum coverage is {fields[11]}; expected {int(coverage)} on this path")
    if _over_caps(header):
        raise FrameError(f"{header} is over the caps of a frame: {CAPS}")
    if header.payload != length - HEADER.size:
        raise FrameError(f"the header claims {header.payload} payload bytes; {length - HEADER.size} came")
    found = zlib.crc32(frame[:CRC_AT])
    if coverage is Coverage.WHOLE:
        found = zlib.crc32(memoryview(frame)[CRC_AT + CRC.size : length], found)
    if found != fields[12]:
        raise FrameError("the checksum does not fit the frame: it was damaged on the way")
    return header


def check_request_size(header: Header) -> None:
    """Raises FrameError unless the payload is as long as the request's tensors."""
    wanted = 4 * (2 * header.pairs + header.rows * header.hidden)
    if header.kind != Kind.FORWARD or header.payload != wanted:
        raise FrameError(
            f"{header.rows} rows of {header.hidden} and {header.pairs} pairs need {wanted} bytes, not {header.payload}"
        )


def check_reply_size(header: Header) -> None:
    """Raises FrameError unless the payload is as long as the reply's tensor."""
    wanted = 4 * header.pairs * header.hidden
    if header.kind != Kind.REPLY or header.payload != wanted:
        raise FrameError(
            f"a reply of {header.pairs} rows of {header.hidden} needs {wanted} bytes, not {header.payload}"
        )


def encode_request(request: ForwardRequest, correlation: int) -> bytes:
    """A forward request as one frame; raises FrameError when it is over a cap."""
    payload = (tensor_bytes(request.x_RD), tensor_bytes(request.pair_row_P), tensor_bytes(request.pair_expert_P))
    return _assemble(request_header(request, correlation), payload)


def encode_reply(reply: ForwardReply, correlation: int) -> bytes:
    """A forward reply as one frame."""
    pairs, hidden = reply.y_PD.shape
    return _assemble(reply_header(reply.generation, pairs, hidden, correlation), (tensor_bytes(reply.y_PD),))


def encode_refusal(refusal: HostRefused, correlation: int) -> bytes:
    """A refusal as one frame."""
    payload = refusal_payload(refusal)
    return _assemble(Header(Kind.REFUSAL, 0, 0, 0, correlation, 0, 0, 0, len(payload)), (memoryview(payload),))


def decode_header(frame: bytes) -> Header:
    """Check a frame of a byte stream, all of it; raises FrameError naming what is wrong."""
    return parse_header(frame, len(frame), Coverage.WHOLE)


def decode_request(header: Header, frame: bytes) -> ForwardRequest:
    """The forward request in a frame whose header was checked; raises FrameError when the tensors do not fit it."""
    check_request_size(header)
    numbers = header.rows * header.hidden
    at = HEADER.size + 4 * numbers
    return ForwardRequest(
        epoch=header.epoch,
        generation=header.generation,
        layer=header.layer,
        x_RD=_view(frame, np.dtype("<f4"), numbers, HEADER.size).view(header.rows, header.hidden),
        pair_row_P=_view(frame, np.dtype("<i4"), header.pairs, at),
        pair_expert_P=_view(frame, np.dtype("<i4"), header.pairs, at + 4 * header.pairs),
    )


def decode_reply(header: Header, frame: bytes) -> ForwardReply:
    """The reply in a checked frame; raises HostRefused when it is a refusal, FrameError when it is neither."""
    if header.kind == Kind.REFUSAL:
        raise parse_refusal(frame[HEADER.size :])
    check_reply_size(header)
    y = _view(frame, np.dtype("<f4"), header.pairs * header.hidden, HEADER.size)
    return ForwardReply(header.generation, y.view(header.pairs, header.hidden))


def _over_caps(header: Header) -> bool:
    return (
        header.rows > MAX_ROWS
        or header.pairs > MAX_PAIRS
        or header.hidden > MAX_HIDDEN
        or header.payload > MAX_PAYLOAD_BYTES
    )


def _assemble(header: Header, payload: tuple[memoryview, ...]) -> bytes:
    head = bytearray(HEADER.size)
    write_header(head, header, Coverage.WHOLE, payload)
    return b"".join((head, *payload))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers as a frame's payload has them."""
    if not tensor.numel():
        return memoryview(b"")
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = tensor.detach().cpu().contiguous().numpy()
    return array.data.cast("B")


def _view(frame: bytes, dtype: np.dtype[np.generic], count: int, offset: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=torch.float32 if dtype.kind == "f" else torch.int32)
    # torch wants writable memory; a frame is ours alone and nothing writes to these tensors
    return torch.from_numpy(np.frombuffer(bytearray(memoryview(frame)[offset : offset + 4 * count]), dtype))
