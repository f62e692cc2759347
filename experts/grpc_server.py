"""An expert host's door on gRPC: one stream a client, many requests in flight on it, replies as they are ready.

The same door gives leases, by which requests then go past it to the same loop, and hands weights to other hosts.
"""

import hmac
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from experts.errors import FrameError, HostRefused, TransferFailed
from experts.frames import decode_header, decode_request, encode_refusal, encode_reply
from experts.host import ExpertHost
from experts.host_loop import HostLoop
from experts.lease import METHOD as LEASE_METHOD
from experts.lease_door import LeaseDoor
from experts.lease_server import serve_lease
from experts.tls import TlsFiles, server_credentials
from experts.transfer import METHOD as FETCH_METHOD
from experts.transfer import decode_request as decode_fetch
from experts.transfer import encode_expert
from experts.wire import METHOD, OPTIONS, TOKEN_KEY, identity

if TYPE_CHECKING:
    from experts.training.door import TrainingDoor

MAX_CLIENTS = 128


class ExpertServer(grpc.GenericRpcHandler):
    """Serves one host on `bind`; `address` has the port that was chosen for port 0."""

    def __init__(
        self,
        host: ExpertHost,
        bind: str = "127.0.0.1:0",
        token: str | None = None,
        tls: TlsFiles | None = None,
        door: LeaseDoor | None = None,
        training: "TrainingDoor | None" = None,
    ) -> None:
        self._host = host
        self._training = training
        self._token = token
        self._door = door
        self._packing = threading.Lock()  # weights are made ready for one receiver at a time, beside the computing
        self._loop = HostLoop(host, door)
        # a client may hold two streams: its calls, and its lease
        self._streams = ThreadPoolExecutor(2 * MAX_CLIENTS, "expert-stream")
        self._server = grpc.server(self._streams, options=OPTIONS)
        self._server.add_generic_rpc_handlers((self,))
        if tls is None:
            port = self._server.add_insecure_port(bind)
        else:
            port = self._server.add_secure_port(bind, server_credentials(tls))
        self.address = f"{bind.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        self._loop.start()
        self._server.start()

    def stop(self, grace_s: float = 1.0) -> None:
        """Refuse new streams, give running ones `grace_s`, then cut them."""
        self._server.stop(grace_s).wait(grace_s + 1.0)
        self._streams.shutdown(wait=False)  # a guest's threads would stay with its host
        ended = self._loop.close(grace_s + 1.0)
        if self._door is not None and ended:
            self._door.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method == METHOD:
            return grpc.stream_stream_rpc_method_handler(self._forward, identity, identity)
        if handler_call_details.method == LEASE_METHOD and self._door is not None:
            return grpc.stream_stream_rpc_method_handler(self._lease, identity, identity)
        if handler_call_details.method == FETCH_METHOD:
            return grpc.unary_stream_rpc_method_handler(self._fetch, identity, identity)
        if self._training is not None:
            return self._training.handler(handler_call_details.method, self._check_token)
        return None

    def _check_token(self, context: grpc.ServicerContext) -> None:
        given = dict(context.invocation_metadata()).get(TOKEN_KEY, "")
        if self._token is not None and not hmac.compare_digest(str(given), self._token):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"the {TOKEN_KEY} of this service is required")

    def _lease(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._check_token(context)
        assert self._door is not None
        return serve_lease(self._door, messages, context)

    def _forward(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._check_token(context)
        for frame in frames:
            yield self._answer(frame)

    def _fetch(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """The weights of each pair that the request names, one message each, as they are sent."""
        self._check_token(context)
        host = self._host
        try:
            request = decode_fetch(message)
        except TransferFailed as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if request.generation != host.generation:
            reason = f"{host.host_id} is in generation {host.generation}; the request was for {request.generation}"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        missing = sorted(set(request.pairs) - set(host.held))
        if missing:
            reason = f"{host.host_id} does not hold {len(missing)} of the (layer, expert) pairs, {missing[0]} first"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        for layer, expert in request.pairs:
            try:
                with self._packing:
                    packed = encode_expert((layer, expert), host.weights(layer, expert))
            except KeyError as error:  # unloaded meanwhile
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.args[0])
            yield packed

    def _answer(self, frame: bytes) -> bytes:
        """A reply frame, or a refusal: a bad frame costs its sender one call and nobody else anything."""
        correlation = 0
        try:
            header = decode_header(frame)
            correlation = header.correlation
            answer = self._loop.submit(decode_request(header, frame)).result()
        except FrameError as error:
            answer = HostRefused("bad_request", str(error))
        if isinstance(answer, HostRefused):
            return encode_refusal(answer, correlation)
        return encode_reply(answer, correlation)
