"""A receiver's end of a transfer: experts from a host that holds them, each checked before it is handed on."""

import threading
from collections.abc import Generator, Sequence

import grpc

from experts.errors import TransferFailed
from experts.grpc_stream import call_metadata, describe, open_channel
from experts.tls import TlsFiles
from experts.transfer import METHOD, ExpertForm, decode_expert, encode_request
from experts.wire import identity
from model.checkpoint import ExpertWeights
from router.holding import Pair
from router.placement import Host


def fetch(
    host: Host,
    pairs: Sequence[Pair],
    form: ExpertForm,
    token: str | None = None,
    tls: TlsFiles | None = None,
    timeout_s: float = 10.0,
) -> Generator[tuple[Pair, ExpertWeights], None, None]:
    """Each pair with its weights, CPU tensors of `form`, in the order of `pairs`; close it to end early.

    Raises TransferFailed, before or between pairs, when the host cannot be reached or refuses, when an expert takes
    longer than `timeout_s` to come, as from a frozen host, and when one that came is not what was asked for.
    """
    with open_channel(host, tls) as channel:  # whose end is the call's
        call = channel.unary_stream(METHOD, identity, identity)(
            encode_request(host.generation, pairs), metadata=call_metadata(token)
        )
        for pair in pairs:
            try:
                weights = decode_expert(_next(call, pair, timeout_s), pair, form)
            except TransferFailed as error:
                raise TransferFailed(f"{host.id} at {host.address}: {error}") from error.__cause__
            yield pair, weights


def _next(call: grpc.Call, pair: Pair, timeout_s: float) -> bytes:
    """The stream's next message. gRPC's own deadline is for a whole call, so that a timer ends one that is silent."""
    layer, expert = pair
    silent = threading.Event()

    def give_up() -> None:
        silent.set()
        call.cancel()

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        message: bytes | None = next(call, None)
    except grpc.RpcError as error:
        if silent.is_set():
            reason = f"expert {expert} of layer {layer} did not come in {timeout_s:.1f} s"
        else:
            reason = describe(error)
        raise TransferFailed(reason) from error
    finally:
        timer.cancel()
    if message is None:
        raise TransferFailed(f"the stream ended before expert {expert} of layer {layer}")
    return message
