"""The handshake that pairs a client with a host for direct writes, as JSON on the stream `/shoal.Experts/Lease`.

Client: Hello. Host: Offer. Client: Accept. Host: Granted. Then the stream stays open for as long as the pairing lives:
when it breaks the other process is gone, or has done with the pairing, and writes no more.
"""

import base64
import binascii
import struct
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator

from experts.arena import MAX_ARENA_BYTES, MAX_SLOTS

METHOD = "/shoal.Experts/Lease"
VERSION = 2  # of these messages and of Note; the frames have their own
NOTE = struct.Struct("<IIQ")  # what comes with a write: slot, bytes, correlation id
PING = (1 << 32) - 1  # instead of a slot: answer with the same note
MAX_METADATA_BYTES = 1 << 16
MAX_TEXT = 256
ADDRESS_END = 1 << 64


class LeaseRefused(Exception):
    """The pairing cannot be; the message says why. Calls go by gRPC then."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SharedEnd(_Message):
    """Memory that the other may map."""

    way: Literal["shared"] = "shared"
    memory: str = Field(max_length=MAX_TEXT)
    bell: str = Field(max_length=MAX_TEXT, description="rung after a write")


class NixlEnd(_Message):
    """How to reach an agent and one arena of it."""

    way: Literal["nixl"] = "nixl"
    agent: str = Field(min_length=1, max_length=MAX_TEXT)
    metadata: bytes = Field(max_length=MAX_METADATA_BYTES)
    bell: str | None = Field(max_length=MAX_TEXT, description="rung after a write; None: the agent polls")
    address: int = Field(ge=0, lt=ADDRESS_END)

    @field_serializer("metadata")
    def _to_text(self, metadata: bytes) -> str:
        return base64.b64encode(metadata).decode()

    @field_validator("metadata", mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        try:
            return base64.b64decode(given, validate=True)
        except binascii.Error as error:
            raise ValueError(f"not base64: {error}") from error


End = SharedEnd | NixlEnd


class Hello(_Message):
    """What a client wants: slots for its requests on the host, how large those for replies are, and by which ways."""

    version: int
    machine: str = Field(max_length=MAX_TEXT)
    slots: int = Field(ge=1, le=MAX_SLOTS)
    request_bytes: int = Field(ge=1, le=MAX_ARENA_BYTES, description="of a slot")
    reply_bytes: int = Field(ge=1, le=MAX_ARENA_BYTES, description="of a slot")
    shared: bool = Field(description="whether memory may be shared, should both be on one machine")
    nixl: bool


class Offer(_Message):
    """Where a host takes requests. `near`: both may map each other's memory, and ring each other's bell."""

    host: str = Field(max_length=MAX_TEXT)
    generation: int = Field(ge=0)
    near: bool
    end: End = Field(discriminator="way")


class Accept(_Message):
    """Where a client takes replies, by the way that was offered."""

    end: End = Field(discriminator="way")


class Granted(_Message):
    """The host is listening."""

    granted: bool = True


Message = TypeVar("Message", bound=_Message)


def encode(message: _Message) -> bytes:
    return message.model_dump_json().encode()


def decode(kind: type[Message], text: bytes) -> Message:
    """Raises LeaseRefused naming what is wrong."""
    if len(text) > 4 * MAX_METADATA_BYTES:
        raise LeaseRefused(f"a lease message of {len(text)} bytes; expected at most {4 * MAX_METADATA_BYTES}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise LeaseRefused(f"lease message {kind.__name__}: {place}: {first['msg']}") from error
