"""The host's end of the stream `/shoal.Experts/Lease`: as long as it is open, its client's memory is in use."""

from collections.abc import Iterator
from typing import Any

import grpc

from experts.lease import Accept, Granted, Hello, LeaseRefused, decode, encode
from experts.lease_door import LeaseDoor
from experts.pairing import PairingFailed


def serve_lease(door: LeaseDoor, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
    """Pair with one client, and return when it half-closes the stream or is gone."""
    try:
        lease, offer = door.offer(decode(Hello, next(messages, b"")))
        try:
            yield encode(offer)
            door.accept(lease, decode(Accept, next(messages, b"")))
            yield encode(Granted())
            for _ in messages:
                raise LeaseRefused("nothing is expected after Accept but the end")
        finally:
            door.end(lease)
            del lease  # gRPC keeps what broke the stream, and with it this frame
    except (LeaseRefused, PairingFailed) as error:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
