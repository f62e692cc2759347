"""Frames: a fixed header, then tensors as they lie in memory. No pickle, nothing trusted before it is checked.

Header, little-endian: magic, version, kind, layer, epoch, generation, correlation id, rows, pairs, hidden,
payload bytes, CRC-32 of everything else. Every size is checked against its cap and against the payload's true
length before a tensor is made.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from experts.errors import FrameError, HostRefused
from experts.messages import ForwardReply, ForwardRequest

MAGIC = b"SHOL"
VERSION = 1
HEADER = struct.Struct("<4sHHIQQQIIIII")
CRC = struct.Struct("<I")
MAX_ROWS = 1 << 16
MAX_PAIRS = 1 << 20
MAX_HIDDEN = 1 << 16
MAX_PAYLOAD_BYTES = 1 << 30


class Kind(IntEnum):
    FORWARD = 1
    REPLY = 2
    REFUSAL = 3


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; `rows`, `pairs` and `hidden` count numbers, `payload` bytes."""

    kind: Kind
    layer: int
    epoch: int
    generation: int
    correlation: int
    rows: int
    pairs: int
    hidden: int
    payload: int


def encode_request(request: ForwardRequest, correlation: int) -> bytes:
    """A forward request as one frame; raises FrameError when it is over a cap."""
    rows, hidden = request.x_RD.shape
    payload = (_bytes(request.pair_row_P), _bytes(request.pair_expert_P), _bytes(request.x_RD))
    header = Header(
        Kind.FORWARD,
        request.layer,
        request.epoch,
        request.generation,
        correlation,
        rows,
        len(request.pair_row_P),
        hidden,
        sum(map(len, payload)),
    )
    return _assemble(header, payload)


def encode_reply(reply: ForwardReply, correlation: int) -> bytes:
    """A forward reply as one frame."""
    pairs, hidden = reply.y_PD.shape
    payload = _bytes(reply.y_PD)
    return _assemble(
        Header(Kind.REPLY, 0, 0, reply.generation, correlation, 0, pairs, hidden, len(payload)), (payload,)
    )


def encode_refusal(refusal: HostRefused, correlation: int) -> bytes:
    """A refusal as one frame: its code, a newline, its message."""
    payload = f"{refusal.code}\n{refusal.message}".encode()[:65536]
    return _assemble(Header(Kind.REFUSAL, 0, 0, 0, correlation, 0, 0, 0, len(payload)), (payload,))


def decode_header(frame: bytes) -> Header:
    """Check a whole frame's header, length and checksum; raises FrameError naming what is wrong."""
    if len(frame) < HEADER.size + CRC.size:
        raise FrameError(f"{len(frame)} bytes are too few for a frame of at least {HEADER.size + CRC.size}")
    magic, version, kind, layer, epoch, generation, correlation, rows, pairs, hidden, payload, _ = HEADER.unpack_from(
        frame
    )
    if magic != MAGIC:
        raise FrameError(f"magic is {magic!r}; expected {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame version is {version}; this build speaks {VERSION}")
    if kind not in Kind.__members__.values():
        raise FrameError(f"frame kind is {kind}; expected one of {[int(known) for known in Kind]}")
    caps = (("rows", rows, MAX_ROWS), ("pairs", pairs, MAX_PAIRS), ("hidden", hidden, MAX_HIDDEN))
    for name, value, cap in (*caps, ("payload", payload, MAX_PAYLOAD_BYTES)):
        if value > cap:
            raise FrameError(f"{name} is {value}; the cap is {cap}")
    if payload != len(frame) - HEADER.size - CRC.size:
        raise FrameError(f"the header claims {payload} payload bytes; {len(frame) - HEADER.size - CRC.size} came")
    (checksum,) = CRC.unpack_from(frame, len(frame) - CRC.size)
    if zlib.crc32(memoryview(frame)[: -CRC.size]) != checksum:
        raise FrameError("the checksum does not fit the frame: it was damaged on the way")
    return Header(Kind(kind), layer, epoch, generation, correlation, rows, pairs, hidden, payload)


def decode_request(header: Header, frame: bytes) -> ForwardRequest:
    """The forward request in a frame whose header was checked; tensors share the frame's memory."""
    wanted = 4 * (2 * header.pairs + header.rows * header.hidden)
    if header.kind is not Kind.FORWARD or header.payload != wanted:
        raise FrameError(
            f"{header.rows} rows of {header.hidden} and {header.pairs} pairs need {wanted} bytes, not {header.payload}"
        )
    at = HEADER.size
    return ForwardRequest(
        epoch=header.epoch,
        generation=header.generation,
        layer=header.layer,
        pair_row_P=_view(frame, np.dtype("<i4"), header.pairs, at),
        pair_expert_P=_view(frame, np.dtype("<i4"), header.pairs, at + 4 * header.pairs),
        x_RD=_view(frame, np.dtype("<f4"), header.rows * header.hidden, at + 8 * header.pairs).view(
            header.rows, header.hidden
        ),
    )


def decode_reply(header: Header, frame: bytes) -> ForwardReply:
    """The reply in a checked frame; raises HostRefused when it is a refusal, FrameError when it is neither."""
    if header.kind is Kind.REFUSAL:
        code, _, message = frame[HEADER.size : -CRC.size].decode(errors="replace").partition("\n")
        raise HostRefused(code, message)
    wanted = 4 * header.pairs * header.hidden
    if header.kind is not Kind.REPLY or header.payload != wanted:
        raise FrameError(
            f"a reply of {header.pairs} rows of {header.hidden} needs {wanted} bytes, not {header.payload}"
        )
    y = _view(frame, np.dtype("<f4"), header.pairs * header.hidden, HEADER.size)
    return ForwardReply(header.generation, y.view(header.pairs, header.hidden))


def _assemble(header: Header, payload: tuple[bytes | memoryview, ...]) -> bytes:
    caps = ((header.rows, MAX_ROWS), (header.pairs, MAX_PAIRS), (header.hidden, MAX_HIDDEN))
    if any(value > cap for value, cap in (*caps, (header.payload, MAX_PAYLOAD_BYTES))):
        raise FrameError(f"{header} is over the caps of a frame: send fewer rows at once")
    head = HEADER.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.layer,
        header.epoch,
        header.generation,
        header.correlation,
        header.rows,
        header.pairs,
        header.hidden,
        header.payload,
        0,
    )
    checksum = zlib.crc32(head)
    for part in payload:
        checksum = zlib.crc32(part, checksum)
    return b"".join((head, *payload, CRC.pack(checksum)))


def _bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = tensor.detach().cpu().contiguous().numpy()
    return array.data.cast("B")


def _view(frame: bytes, dtype: np.dtype[np.generic], count: int, offset: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=torch.float32 if dtype.kind == "f" else torch.int32)
    # torch wants writable memory; a frame is ours alone and nothing writes to these tensors
    return torch.from_numpy(np.frombuffer(bytearray(memoryview(frame)[offset : offset + 4 * count]), dtype))
