"""The ways that rows may travel, by name."""

from dataclasses import dataclass
from typing import Literal

from experts.nixl import need_nixl

TransportKind = Literal["auto", "shared", "nixl", "grpc"]
TRANSPORT_KINDS: tuple[TransportKind, ...] = ("auto", "shared", "nixl", "grpc")
Way = Literal["shared", "nixl", "grpc"]
WAYS: tuple[Way, ...] = ("shared", "nixl", "grpc")  # the quickest first


@dataclass(frozen=True, slots=True)
class Ways:
    """Which may be taken besides gRPC, that both ends must have: memory that both map, and NIXL."""

    shared: bool = True
    nixl: bool = True


def check_transport(kind: str) -> None:
    """Raises ValueError for a kind that does not exist, and NixlMissing for nixl where it is not installed."""
    if kind not in TRANSPORT_KINDS:
        raise ValueError(f"transport is {kind!r}; expected one of {', '.join(TRANSPORT_KINDS)}")
    if kind == "nixl":
        need_nixl()
