"""Which way rows travel: shared memory on a machine, NIXL between machines where both have it, else gRPC."""

from experts.arena import slot_bytes
from experts.arena_frames import largest_frames
from experts.grpc_transport import GrpcTransport
from experts.lane import lanes_serve
from experts.lease_door import LeaseDoor
from experts.lease_transport import LeaseTransport
from experts.nixl import nixl_is_installed
from experts.tls import TlsFiles
from experts.transport_kinds import TransportKind, Ways, check_transport


def open_transport(
    kind: TransportKind,
    token: str | None,
    tls: TlsFiles | None,
    step_tokens: int,
    top_k: int,
    hidden: int,
) -> GrpcTransport | LeaseTransport:
    """A client's transport, with slots for steps of `step_tokens` tokens; raises what `ways_of` raises."""
    ways = ways_of(kind)
    if ways is None:
        return GrpcTransport(token, tls)
    request, reply = largest_frames(step_tokens, top_k, hidden)
    return LeaseTransport(token, tls, slot_bytes(request), slot_bytes(reply), ways)


def open_door(kind: TransportKind, host_id: str, generation: int) -> LeaseDoor | None:
    """A host's door for leases, or None where it takes gRPC alone; raises what `ways_of` raises."""
    ways = ways_of(kind)
    return None if ways is None else LeaseDoor(host_id, generation, ways)


def ways_of(kind: TransportKind) -> Ways | None:
    """Which ways besides gRPC a kind allows, and this process has; None where there is none.

    Raises what `check_transport` raises, and ValueError for shared where memory cannot be shared.
    """
    check_transport(kind)
    if kind == "shared" and not lanes_serve():
        raise ValueError(
            "transport shared: it takes Linux and the native kernels (python -m kernels.build); use auto, nixl or grpc"
        )
    # NIXL is not imported before somebody needs it
    ways = Ways(kind in ("auto", "shared") and lanes_serve(), kind in ("auto", "nixl") and nixl_is_installed())
    return ways if ways.shared or ways.nixl else None
