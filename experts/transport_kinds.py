"""The ways that rows may travel, by name."""

from typing import Literal

from experts.nixl import need_nixl

TransportKind = Literal["auto", "nixl", "grpc"]
TRANSPORT_KINDS: tuple[TransportKind, ...] = ("auto", "nixl", "grpc")


def check_transport(kind: str) -> None:
    """Raises ValueError for a kind that does not exist, and NixlMissing for nixl where it is not installed."""
    if kind not in TRANSPORT_KINDS:
        raise ValueError(f"transport is {kind!r}; expected one of {', '.join(TRANSPORT_KINDS)}")
    if kind == "nixl":
        need_nixl()
