"""Which way rows travel: NIXL where it is installed on both sides, gRPC where not, or one of them by name."""

from experts.arena import slot_bytes
from experts.arena_frames import largest_frames
from experts.grpc_transport import GrpcTransport
from experts.nixl import find_nixl
from experts.nixl_door import NixlDoor
from experts.nixl_transport import NixlTransport
from experts.tls import TlsFiles
from experts.transport_kinds import TransportKind, check_transport


def open_transport(
    kind: TransportKind,
    token: str | None,
    tls: TlsFiles | None,
    step_tokens: int,
    top_k: int,
    hidden: int,
) -> GrpcTransport | NixlTransport:
    """A client's transport, with slots for steps of `step_tokens` tokens; raises what `check_transport` raises."""
    check_transport(kind)
    if kind == "grpc" or (kind == "auto" and find_nixl() is None):
        return GrpcTransport(token, tls)
    request, reply = largest_frames(step_tokens, top_k, hidden)
    return NixlTransport(token, tls, slot_bytes(request), slot_bytes(reply))


def open_door(kind: TransportKind, host_id: str, generation: int) -> NixlDoor | None:
    """A host's end of NIXL, or None where it takes gRPC alone; raises what `check_transport` raises."""
    check_transport(kind)
    if kind == "grpc" or (kind == "auto" and find_nixl() is None):
        return None
    return NixlDoor(host_id, generation)
