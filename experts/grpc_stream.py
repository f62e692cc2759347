"""A client's end of one gRPC stream to a host: many calls in flight, answered in whatever order."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc

from experts.errors import ExpertError, FrameError, HostSlow, HostUnavailable
from experts.tls import TlsFiles, channel_credentials, channel_options
from experts.wire import OPTIONS, TOKEN_KEY, identity
from router.placement import Host

CHANNEL_OPTIONS = (
    *OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a restarted host on the same port must not inherit a back-off
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
Request = TypeVar("Request")
Reply = TypeVar("Reply")


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
class Codec(Generic[Request, Reply]):
    """How the frames of one method are written and read."""

    method: str
    encode: Callable[[Request, int], bytes]  # with a correlation id; raises FrameError over a cap
    # the correlation id, and what gives the reply or raises an ExpertError; raises FrameError for what is no frame
    decode: Callable[[bytes], tuple[int, Callable[[], Reply]]]


@dataclass(frozen=True, slots=True)
class StreamCall(Generic[Reply]):
    """A Pending."""

    future: "Future[Reply]"
    host: Host

    def result(self, timeout_s: float) -> Reply:
        try:
            return self.future.result(timeout_s)
        except FutureTimeout:
            raise HostSlow(f"{self.host.id} at {self.host.address}: no reply in {timeout_s:.1f} s") from None

    def release(self) -> None:
        pass  # the reply owns its memory


class FrameStream(Generic[Request, Reply]):
    """One open stream. A thread reads replies and settles the calls they belong to."""

    def __init__(self, host: Host, codec: Codec[Request, Reply], token: str | None, tls: TlsFiles | None) -> None:
        self._host = host
        self._codec = codec
        self._channel = open_channel(host, tls)
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._calls: dict[int, Future[Reply]] = {}
        self._lock = threading.Lock()
        self._broken: str | None = None
        call = self._channel.stream_stream(codec.method, identity, identity)
        self._replies = call(self._requests(), metadata=call_metadata(token))
        threading.Thread(target=self._read, name=f"replies-{host.id}", daemon=True).start()

    @property
    def broken(self) -> bool:
        return self._broken is not None

    def send(self, request: Request, correlation: int) -> StreamCall[Reply]:
        future: Future[Reply] = Future()
        call = StreamCall(future, self._host)
        frame = self._codec.encode(request, correlation)
        with self._lock:
            if self._broken is not None:
                future.set_exception(HostUnavailable(self._broken))
                return call
            self._calls[correlation] = future
        self._out.put(frame)
        return call

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
                correlation, read = self._codec.decode(frame)
                with self._lock:
                    future = self._calls.pop(correlation, None)
                if future is None:  # nobody waits any more
                    continue
                try:
                    future.set_result(read())
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
