"""A client's end of gRPC: one stream a host life, opened on first use and again after it broke."""

import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

import grpc

from experts.errors import ExpertError, FrameError, HostSlow, HostUnavailable
from experts.frames import decode_header, decode_reply, encode_request
from experts.grpc_server import METHOD, OPTIONS, TOKEN_KEY, identity
from experts.messages import ForwardReply, ForwardRequest
from experts.tls import TlsFiles, channel_credentials, channel_options
from router.placement import Host

CHANNEL_OPTIONS = (
    *OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a restarted host on the same port must not inherit a back-off
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def open_channel(host: Host, tls: TlsFiles | None) -> grpc.Channel:
    """A connection of its own to a host's door; made in the background."""
    options = (*CHANNEL_OPTIONS, *channel_options(tls))
    if tls is None:
        return grpc.insecure_channel(host.address, options=options)
    return grpc.secure_channel(host.address, channel_credentials(tls), options=options)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What a stream to a host must show."""
    return ((TOKEN_KEY, token),) if token else ()


def describe(error: grpc.RpcError) -> str:
    """Status and details of a stream that broke."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)


@dataclass(frozen=True, slots=True)
class _Call:
    future: "Future[ForwardReply]"
    host: Host

    def result(self, timeout_s: float) -> ForwardReply:
        try:
            return self.future.result(timeout_s)
        except FutureTimeout:
            raise HostSlow(f"{self.host.id} at {self.host.address}: no reply in {timeout_s:.1f} s") from None

    def release(self) -> None:
        pass  # the reply owns its memory


class _Stream:
    """One open stream. A thread reads replies and settles the calls they belong to, in whatever order."""

    def __init__(self, host: Host, token: str | None, tls: TlsFiles | None) -> None:
        self._host = host
        self._channel = open_channel(host, tls)
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._calls: dict[int, Future[ForwardReply]] = {}
        self._lock = threading.Lock()
        self._broken: str | None = None
        call = self._channel.stream_stream(METHOD, identity, identity)
        self._replies = call(self._requests(), metadata=call_metadata(token))
        threading.Thread(target=self._read, name=f"replies-{host.id}", daemon=True).start()

    @property
    def broken(self) -> bool:
        return self._broken is not None

    def send(self, request: ForwardRequest, correlation: int) -> "Future[ForwardReply]":
        future: Future[ForwardReply] = Future()
        with self._lock:
            if self._broken is not None:
                future.set_exception(HostUnavailable(self._broken))
                return future
            self._calls[correlation] = future
        self._out.put(encode_request(request, correlation))
        return future

    def close(self) -> None:
        self._break("the transport was closed")
        self._replies.cancel()
        self._channel.close()

    def _requests(self) -> Iterator[bytes]:
        while (frame := self._out.get()) is not None:
            yield frame

    def _read(self) -> None:
        reason = "the stream ended"
        try:
            for frame in self._replies:
                header = decode_header(frame)
                with self._lock:
                    future = self._calls.pop(header.correlation, None)
                if future is None:  # nobody waits any more
                    continue
                try:
                    future.set_result(decode_reply(header, frame))
                except ExpertError as error:
                    future.set_exception(error)
        except grpc.RpcError as error:
            reason = describe(error)
        except FrameError as error:
            reason = str(error)
        finally:
            self._break(reason)

    def _break(self, reason: str) -> None:
        with self._lock:
            if self._broken is not None:
                return
            self._broken = f"{self._host.id} at {self._host.address}: {reason}"
            calls, self._calls = self._calls, {}
        self._out.put(None)
        for future in calls.values():
            future.set_exception(HostUnavailable(self._broken))


class GrpcTransport:
    """Streams to hosts by (id, generation, address)."""

    def __init__(self, token: str | None = None, tls: TlsFiles | None = None) -> None:
        self._token = token
        self._tls = tls
        self._streams: dict[Host, _Stream] = {}
        self._lock = threading.Lock()
        self._correlations = itertools.count(1)

    def submit(self, host: Host, request: ForwardRequest) -> _Call:
        """Send without waiting; raises FrameError when the request is over a frame's caps."""
        with self._lock:
            stream = self._streams.get(host)
            if stream is None or stream.broken:
                stream = self._streams[host] = _Stream(host, self._token, self._tls)
        return _Call(stream.send(request, next(self._correlations)), host)

    def forget(self, host: Host) -> None:
        with self._lock:
            stream = self._streams.pop(host, None)
        if stream is not None:
            stream.close()

    def close(self) -> None:
        with self._lock:
            streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.close()
