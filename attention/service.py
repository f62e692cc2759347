"""The door of an attention worker: one gRPC stream per ingress carries all of its requests and their tokens."""

import hmac
import json
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from attention.requests import GenerateRequest, Update
from attention.runner import EngineThread
from attention.wire import METHOD, OPTIONS
from experts.tls import TlsFiles, server_credentials
from experts.wire import identity

MAX_STREAMS = 64  # ingress replicas connected at once


class _Stream:
    """One ingress's stream: gathers updates, and hands them on when a step ends."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine
        self._batch: list[Update] = []
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._live: set[str] = set()
        self._closed = False
        self._lock = threading.Lock()

    def on_update(self, update: Update) -> None:
        with self._lock:
            self._batch.append(update)
            if update.finish_reason is not None:
                self._live.discard(update.id)

    def on_step_end(self) -> None:
        with self._lock:
            batch, self._batch = self._batch, []
        if batch:
            message = {"updates": [update.to_json_dict() for update in batch]}
            self._out.put(json.dumps(message, separators=(",", ":")).encode())

    def read(self, messages: Iterator[bytes]) -> None:
        """Apply the ingress's messages until it hangs up; a malformed one ends the stream."""
        try:
            for message in messages:
                self._apply(message)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, grpc.RpcError):
            pass  # the stream is over: `write` ends and the caller cleans up
        finally:
            self._out.put(None)

    def write(self) -> Iterator[bytes]:
        while (message := self._out.get()) is not None:
            yield message

    def close(self) -> None:
        """Cancel what is running, and what `read` may still submit meanwhile."""
        with self._lock:
            self._closed = True
            live = list(self._live)
        for request_id in live:
            self._engine.cancel(request_id)

    def _apply(self, message: bytes) -> None:
        command = json.loads(message)
        if "submit" in command:
            request = GenerateRequest.from_json_dict(command["submit"])
            with self._lock:
                self._live.add(request.id)
            self._engine.submit(request, self.on_update)
            with self._lock:
                closed = self._closed
            if closed:
                self._engine.cancel(request.id)
        else:
            request_id = str(command["cancel"])
            with self._lock:
                self._live.discard(request_id)
            self._engine.cancel(request_id)


class AttentionServer(grpc.GenericRpcHandler):
    """Serves an EngineThread on `bind`; `address` has the port that was chosen for port 0."""

    def __init__(self, engine: EngineThread, bind: str, token: str | None = None, tls: TlsFiles | None = None) -> None:
        self._engine = engine
        self._token = token
        self._server = grpc.server(ThreadPoolExecutor(MAX_STREAMS, "attention-stream"), options=OPTIONS)
        self._server.add_generic_rpc_handlers((self,))
        host = bind.rpartition(":")[0]
        if tls is None:
            port = self._server.add_insecure_port(bind)
        else:
            port = self._server.add_secure_port(bind, server_credentials(tls))
        self.address = f"{host}:{port}"

    def start(self) -> None:
        self._server.start()

    def stop(self, grace_s: float = 1.0) -> None:
        self._server.stop(grace_s).wait(grace_s + 1.0)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method != METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self._generate, identity, identity)

    def _generate(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        given = dict(context.invocation_metadata()).get("shoal-token", "")
        if self._token is not None and not hmac.compare_digest(str(given), self._token):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the shoal-token of this service is required")
        if not self._engine.alive:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"the engine of this worker has ended: {self._engine.failure!r}")
        context.send_initial_metadata(())  # accepted: only now does the client write, see AttentionClient
        stream = _Stream(self._engine)
        self._engine.add_step_listener(stream.on_step_end)
        reader = threading.Thread(target=stream.read, args=(messages,), name="attention-read", daemon=True)
        reader.start()
        try:
            yield from stream.write()
        finally:
            self._engine.remove_step_listener(stream.on_step_end)
            stream.close()
