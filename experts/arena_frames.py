"""Frames in a slot: written where they are sent from, read where they arrived.

The checksum covers the header alone: shared memory and RDMA guard the payload, and a CRC over it would cost more than
the transfer. What decides which memory is touched (header, row numbers, expert numbers) is read once, into memory of
our own, so that a peer that goes on writing cannot change it after it was checked.
"""

import numpy as np
import torch
from torch import Tensor

from experts.arena import Slot
from experts.errors import FrameError, HostRefused
from experts.frames import (
    HEADER,
    Coverage,
    Header,
    Kind,
    check_reply_size,
    check_request_size,
    parse_header,
    parse_refusal,
    refusal_payload,
    reply_header,
    request_header,
    write_header,
)
from experts.messages import ForwardReply, ForwardRequest


def put_request(slot: Slot, request: ForwardRequest, correlation: int) -> int | None:
    """Write a request; its length in bytes, or None when the slot is too small. Raises FrameError over a cap."""
    header = request_header(request, correlation)
    if header.payload > slot.payload_bytes:
        return None
    write_header(slot.frame, header, Coverage.HEADER)
    numbers, pairs = header.rows * header.hidden, header.pairs
    slot.floats[:numbers] = request.x_RD.numpy(force=True).reshape(-1)
    slot.ints[numbers : numbers + pairs] = request.pair_row_P.numpy(force=True)
    slot.ints[numbers + pairs : numbers + 2 * pairs] = request.pair_expert_P.numpy(force=True)
    return HEADER.size + header.payload


def get_request(slot: Slot, length: int, correlation: int) -> ForwardRequest:
    """The request that arrived in `length` bytes of a slot; x is a view of it. Raises FrameError when it lies."""
    header = _parse(slot, length, correlation)
    check_request_size(header)
    numbers, pairs = header.rows * header.hidden, header.pairs
    indices = slot.ints[numbers : numbers + 2 * pairs].copy()
    return ForwardRequest(
        epoch=header.epoch,
        generation=header.generation,
        layer=header.layer,
        x_RD=_matrix(slot, header.rows, header.hidden),
        pair_row_P=torch.from_numpy(indices[:pairs]),
        pair_expert_P=torch.from_numpy(indices[pairs:]),
    )


def reply_view(slot: Slot, pairs: int, hidden: int) -> Tensor | None:
    """Where a reply's y [P, D] belongs, or None when the slot is too small for it."""
    if 4 * pairs * hidden > slot.payload_bytes:
        return None
    return _matrix(slot, pairs, hidden)


def put_reply(slot: Slot, generation: int, pairs: int, hidden: int, correlation: int) -> int:
    """Write the header before a y that is in its place already; the frame's length in bytes."""
    header = reply_header(generation, pairs, hidden, correlation)
    write_header(slot.frame, header, Coverage.HEADER)
    return HEADER.size + header.payload


def put_refusal(slot: Slot, refusal: HostRefused, correlation: int) -> int:
    """Write a refusal, cut to the slot; its length in bytes."""
    payload = refusal_payload(refusal)[: slot.payload_bytes]
    header = Header(Kind.REFUSAL, 0, 0, 0, correlation, 0, 0, 0, len(payload))
    write_header(slot.frame, header, Coverage.HEADER)
    slot.frame[HEADER.size : HEADER.size + len(payload)] = payload
    return HEADER.size + len(payload)


def get_reply(slot: Slot, length: int, correlation: int) -> ForwardReply:
    """The reply that arrived; y is a view of the slot. Raises HostRefused when it is a refusal, or FrameError."""
    header = _parse(slot, length, correlation)
    if header.kind == Kind.REFUSAL:
        raise parse_refusal(bytes(slot.frame[HEADER.size : length]))
    check_reply_size(header)
    return ForwardReply(header.generation, _matrix(slot, header.pairs, header.hidden))


def _matrix(slot: Slot, rows: int, columns: int) -> Tensor:
    return torch.from_numpy(slot.floats[: rows * columns].reshape(rows, columns))  # half the cost of torch's own views


def _parse(slot: Slot, length: int, correlation: int) -> Header:
    if not HEADER.size <= length <= len(slot.frame):
        raise FrameError(f"a frame of {length} bytes was announced; expected {HEADER.size} to {len(slot.frame)}")
    header = parse_header(slot.frame, length, Coverage.HEADER)
    if header.correlation != correlation:
        raise FrameError(f"call {correlation} was announced; the slot holds a frame of call {header.correlation}")
    return header


def largest_frames(step_tokens: int, top_k: int, hidden: int) -> tuple[int, int]:
    """Bytes of the largest request and the largest reply of a step whose experts all live on one host."""
    pairs = step_tokens * top_k
    numbers = np.array([step_tokens * hidden + 2 * pairs, pairs * hidden])
    request, reply = (4 * numbers + HEADER.size).tolist()
    return request, reply
