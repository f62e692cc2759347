"""An expert host's door on gRPC: one stream a client, many requests in flight on it, replies as they are ready."""

import hmac
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from experts.errors import FrameError, HostRefused
from experts.frames import decode_header, decode_request, encode_refusal, encode_reply
from experts.host import ExpertHost
from experts.tls import TlsFiles, server_credentials

METHOD = "/shoal.Experts/Forward"
TOKEN_KEY = "shoal-token"
MAX_MESSAGE_BYTES = (1 << 30) + 4096
MAX_CLIENTS = 128
OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
)


def identity(message: bytes) -> bytes:
    """gRPC's serialiser of frames, which are bytes already."""
    return message


class ExpertServer(grpc.GenericRpcHandler):
    """Serves one host on `bind`; `address` has the port that was chosen for port 0."""

    def __init__(
        self,
        host: ExpertHost,
        bind: str = "127.0.0.1:0",
        token: str | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._host = host
        self._token = token
        self._server = grpc.server(ThreadPoolExecutor(MAX_CLIENTS, "expert-stream"), options=OPTIONS)
        self._server.add_generic_rpc_handlers((self,))
        if tls is None:
            port = self._server.add_insecure_port(bind)
        else:
            port = self._server.add_secure_port(bind, server_credentials(tls))
        self.address = f"{bind.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        self._server.start()

    def stop(self, grace_s: float = 1.0) -> None:
        """Refuse new streams, give running ones `grace_s`, then cut them."""
        self._server.stop(grace_s).wait(grace_s + 1.0)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method != METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self._forward, identity, identity)

    def _forward(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        given = dict(context.invocation_metadata()).get(TOKEN_KEY, "")
        if self._token is not None and not hmac.compare_digest(str(given), self._token):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"the {TOKEN_KEY} of this service is required")
        for frame in frames:
            yield self._answer(frame)

    def _answer(self, frame: bytes) -> bytes:
        """A reply frame, or a refusal: a bad frame costs its sender one call and nobody else anything."""
        correlation = 0
        try:
            header = decode_header(frame)
            correlation = header.correlation
            return encode_reply(self._host.forward(decode_request(header, frame)), correlation)
        except FrameError as error:
            return encode_refusal(HostRefused("bad_request", str(error)), correlation)
        except HostRefused as refusal:
            return encode_refusal(refusal, correlation)
