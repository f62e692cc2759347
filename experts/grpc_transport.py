"""Rows to expert hosts by gRPC: one stream a host life, opened on first use and again after it broke."""

import itertools
import threading
from collections.abc import Callable, Sequence

from experts.frames import decode_header, decode_reply, encode_request
from experts.grpc_stream import Codec, FrameStream, StreamCall
from experts.messages import ForwardReply, ForwardRequest
from experts.tls import TlsFiles
from experts.transport_kinds import Way
from experts.wire import METHOD
from router.placement import Host


def _decode(frame: bytes) -> tuple[int, Callable[[], ForwardReply]]:
    header = decode_header(frame)
    return header.correlation, lambda: decode_reply(header, frame)


FORWARD: Codec[ForwardRequest, ForwardReply] = Codec(METHOD, encode_request, _decode)


class GrpcTransport:
    """Streams to hosts by (id, generation, address)."""

    def __init__(self, token: str | None = None, tls: TlsFiles | None = None) -> None:
        self._token = token
        self._tls = tls
        self._streams: dict[Host, FrameStream[ForwardRequest, ForwardReply]] = {}
        self._lock = threading.Lock()
        self._correlations = itertools.count(1)

    def submit(self, host: Host, request: ForwardRequest) -> StreamCall[ForwardReply]:
        """Send without waiting; raises FrameError when the request is over a frame's caps."""
        with self._lock:
            stream = self._streams.get(host)
            if stream is None or stream.broken:
                stream = self._streams[host] = FrameStream(host, FORWARD, self._token, self._tls)
        return stream.send(request, next(self._correlations))

    def flush(self) -> None:
        pass  # it left already

    def lanes(self, hosts: Sequence[Host]) -> None:
        return None

    def ways(self) -> dict[Host, Way]:
        """By which way rows go just now to each host that was asked; any thread may ask."""
        return dict.fromkeys(self._streams.copy(), "grpc")

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
