"""What all leases of one client share."""

from collections.abc import Callable
from dataclasses import dataclass

from experts.bell import Bell
from experts.nixl_agent import NixlAgent
from experts.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    """Of the process that asks, and of its slots."""

    token: str | None
    tls: TlsFiles | None
    machine: str
    request_bytes: int  # of a slot
    reply_bytes: int  # of a slot
    shared: bool  # whether hosts of this machine may be reached by shared memory
    nixl: bool  # whether NIXL may be used
    agent: Callable[[bool], NixlAgent]  # for near hosts, or far ones; raises NixlMissing
    bell: Bell
    crowded: Callable[[], bool]  # whether near hosts that compute for this client take all cores
