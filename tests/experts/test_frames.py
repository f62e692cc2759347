"""Frames give back what was put in, and nothing else decodes: no lie, no damage, no noise."""

import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import FrameError, HostRefused
from experts.frames import (
    CRC,
    CRC_AT,
    HEADER,
    decode_header,
    decode_reply,
    decode_request,
    encode_refusal,
    encode_reply,
    encode_request,
)
from experts.messages import ForwardReply, ForwardRequest

FIELDS = (
    *("magic", "version", "kind", "layer", "epoch", "generation"),
    *("correlation", "rows", "pairs", "hidden", "payload", "coverage"),
)


def request(rows: int = 3, hidden: int = 4, pairs: int = 5, seed: int = 0) -> ForwardRequest:
    generator = torch.Generator().manual_seed(seed)
    return ForwardRequest(
        epoch=7,
        generation=2,
        layer=1,
        x_RD=torch.randn(rows, hidden, generator=generator),
        pair_row_P=torch.randint(0, max(rows, 1), (pairs,), generator=generator, dtype=torch.int32),
        pair_expert_P=torch.randint(0, 64, (pairs,), generator=generator, dtype=torch.int32),
    )


def with_field(frame: bytes, name: str, value: object) -> bytes:
    """The frame with one header field replaced, and a checksum that fits again."""
    fields = [*HEADER.unpack_from(frame)[:-1], 0]
    fields[FIELDS.index(name)] = value
    head = HEADER.pack(*fields)
    checksum = zlib.crc32(head[CRC_AT + CRC.size :] + frame[HEADER.size :], zlib.crc32(head[:CRC_AT]))
    return head[:CRC_AT] + CRC.pack(checksum) + head[CRC_AT + CRC.size :] + frame[HEADER.size :]


def decode(frame: bytes) -> object:
    header = decode_header(frame)
    return decode_request(header, frame) if header.kind == 1 else decode_reply(header, frame)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_a_request_survives_the_wire(rows: int, hidden: int, pairs: int, seed: int) -> None:
    sent = request(rows, hidden, pairs, seed)
    frame = encode_request(sent, correlation=99)
    header = decode_header(frame)
    received = decode_request(header, frame)
    assert header.correlation == 99
    assert (received.epoch, received.generation, received.layer) == (7, 2, 1)
    assert torch.equal(received.x_RD, sent.x_RD)
    assert torch.equal(received.pair_row_P, sent.pair_row_P)
    assert torch.equal(received.pair_expert_P, sent.pair_expert_P)


@given(st.integers(0, 9), st.integers(1, 9))
def test_a_reply_survives_the_wire(pairs: int, hidden: int) -> None:
    sent = ForwardReply(3, torch.randn(pairs, hidden))
    frame = encode_reply(sent, correlation=5)
    received = decode_reply(decode_header(frame), frame)
    assert received.generation == 3
    assert torch.equal(received.y_PD, sent.y_PD)


def test_a_refusal_arrives_as_the_exception_that_was_sent() -> None:
    frame = encode_refusal(HostRefused("not_held", "host-1 does not hold experts [3]\nof layer 2"), 8)
    with pytest.raises(HostRefused) as caught:
        decode_reply(decode_header(frame), frame)
    assert (caught.value.code, caught.value.message) == ("not_held", "host-1 does not hold experts [3]\nof layer 2")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("magic", b"SHUL", "magic"),
        ("version", 1, "version"),
        ("kind", 9, "kind"),
        ("coverage", 1, "coverage is 1; expected 0"),
        ("rows", 2**32 - 1, "rows=4294967295.*over the caps"),
        ("pairs", 2**31, "pairs=2147483648.*over the caps"),
        ("hidden", 2**31, "hidden=2147483648.*over the caps"),
        ("payload", 2**32 - 1, "payload=4294967295.*over the caps"),
        ("payload", 12, "claims 12 payload bytes"),
        ("rows", 4, "need"),
        ("pairs", 6, "need"),
        ("hidden", 5, "need"),
    ],
)
def test_a_header_that_lies_is_named(name: str, value: object, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        decode(with_field(encode_request(request(), 1), name, value))


def test_a_frame_over_the_caps_is_not_sent() -> None:
    wide = ForwardRequest(1, 1, 1, torch.empty(1, 1 << 17), torch.zeros(1, dtype=torch.int32), torch.zeros(1).int())
    with pytest.raises(FrameError, match="over the caps"):
        encode_request(wide, 1)


@settings(max_examples=300)
@given(st.data())
def test_one_flipped_bit_is_always_noticed(data: st.DataObject) -> None:
    frame = bytearray(encode_request(request(), 1))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        decode(bytes(frame))


@given(st.binary(max_size=400))
def test_noise_is_no_frame(noise: bytes) -> None:
    with pytest.raises(FrameError):
        decode(noise)


@given(st.integers(0, 200))
def test_a_frame_cut_short_is_no_frame(length: int) -> None:
    frame = encode_request(request(), 1)
    with pytest.raises(FrameError):
        decode(frame[: min(length, len(frame) - 1)])


def test_the_header_has_the_documented_size() -> None:
    assert HEADER.size == struct.calcsize("<4sHHIQQQIIIIII4x") == 64
