"""Expert hosts that train, by gRPC: a stream of backward calls and single calls beside it."""

import contextlib
import itertools
import json
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from experts.errors import CallRefused, ExpertError, HostUnavailable
from experts.frames import MAX_PAYLOAD_BYTES, parse_refusal
from experts.grpc_stream import Codec, FrameStream, StreamCall, call_metadata, describe, open_channel
from experts.tls import TlsFiles
from experts.training.blocks import LEAST_BYTES, Blocks, PlainCall, SharedCall, layout_of
from experts.training.door import SERVICE
from experts.training.frames import SharedAnswer, decode_answer, encode_request, encode_shared
from experts.training.host import HostState
from experts.training.messages import BackwardReply, BackwardRequest
from experts.training.peer import PendingGradients
from experts.training.spec import ExpertTraining
from experts.training.waiting import SUSPECT_S, Supervisor, Waiting
from experts.wire import identity
from model.snapshots.manifest import Shard
from router.holding import Pair
from router.placement import Host

CALL_TIMEOUT_S = 3600.0  # a host that dies breaks its calls at once; this is for one that hangs
LOOK_S = SUSPECT_S  # between looks: hosts of an earlier table are asked, too, and may take that long
Answer = BackwardReply | SharedAnswer
BACKWARD: Codec[bytes, Answer] = Codec(f"{SERVICE}Backward", lambda frame, _: frame, decode_answer)


class GrpcPeer:
    """One life of one host. May be used by several threads."""

    def __init__(
        self, host: Host, token: str | None, tls: TlsFiles | None, supervisor: Supervisor | None = None
    ) -> None:
        self._host = host
        self._supervisor = supervisor
        self._token = token
        self._tls = tls
        self._channel = open_channel(host, tls)
        self._metadata = call_metadata(token)
        self._stream: FrameStream[bytes, Answer] | None = None
        self._blocks: Blocks | None = Blocks() if sys.platform == "linux" else None  # None: it cannot share memory
        self._lock = threading.Lock()
        self._correlations = itertools.count(1)

    def configure(self, training: ExpertTraining) -> None:
        self._call("Configure", training=training.to_json())

    def status(self) -> HostState:
        raw = self._call("Status")
        return HostState(raw["run_id"], {(layer, expert): version for layer, expert, version in raw["versions"]})

    def begin(self, step: int, micros: int, ranks: int, pairs: Collection[Pair]) -> None:
        self._call("Begin", step=step, micros=micros, ranks=ranks, pairs=list(pairs))

    def backward(self, request: BackwardRequest) -> PendingGradients:
        """Send without waiting; raises FrameError when the request is over a frame's caps."""
        layout, blocks = layout_of(request), self._blocks
        if blocks is None or not LEAST_BYTES <= layout.nbytes <= MAX_PAYLOAD_BYTES:
            return PlainCall(self._send(lambda correlation: encode_request(request, correlation)))
        try:
            block = blocks.take(layout.nbytes)
        except OSError:
            return self._in_frames(request)
        layout.write(block.memory, request)
        call = self._send(lambda correlation: encode_shared(request, block.address, correlation))
        return SharedCall(call, layout, block, blocks, lambda: self._in_frames(request))

    def _in_frames(self, request: BackwardRequest) -> PendingGradients:
        """Send the same again, and all that follow, without shared memory, which cannot be had or mapped."""
        self._blocks = None
        return self.backward(request)

    def _send(self, encode: Callable[[int], bytes]) -> StreamCall[Answer]:
        with self._lock:
            if self._stream is None or self._stream.broken:
                self._stream = FrameStream(self._host, BACKWARD, self._token, self._tls)
            stream = self._stream
        correlation = next(self._correlations)
        return stream.send(encode(correlation), correlation)

    def squared_norms(self, step: int) -> Mapping[Pair, float]:
        return {(layer, expert): norm for layer, expert, norm in self._call("Norms", step=step)["norms"]}

    def apply(self, step: int, learning_rate: float, grad_scale: float) -> None:
        self._call("Apply", step=step, learning_rate=learning_rate, grad_scale=grad_scale)

    def pull(self, pairs: Collection[Pair], source: Host) -> None:
        self._call("Pull", pairs=list(pairs), source=asdict(source))

    def restart(self, pairs: Collection[Pair]) -> None:
        self._call("Restart", pairs=list(pairs))

    def save(self, staging: Path, pairs: Collection[Pair], step: int) -> Sequence[Shard]:
        raw = self._call("Save", staging=str(staging), pairs=list(pairs), step=step)
        return [Shard(name, nbytes, sha256, tuple(tensors)) for name, nbytes, sha256, tensors in raw["shards"]]

    def load(self, snapshot: Path, pairs: Collection[Pair]) -> None:
        self._call("Load", snapshot=str(snapshot), pairs=list(pairs))

    def states(self, pairs: Sequence[Pair]) -> Iterator[bytes]:
        """Each expert's state as `encode_state` makes it; raises HostUnavailable or HostRefused."""
        call = self._channel.unary_stream(f"{SERVICE}States", identity, identity)
        message = json.dumps({"generation": self._host.generation, "pairs": list(pairs)}).encode()
        try:
            yield from call(message, metadata=self._metadata, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._error(error) from None

    def close(self) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        if self._blocks is not None:
            self._blocks.close()
        self._channel.close()

    def _call(self, name: str, **given: Any) -> dict[str, Any]:
        message = json.dumps({"generation": self._host.generation, **given}).encode()
        call = self._channel.unary_unary(SERVICE + name, identity, identity)
        try:
            pending = call.future(message, metadata=self._metadata, timeout=CALL_TIMEOUT_S)
            answer: dict[str, Any] = json.loads(self._wait(name, pending))
        except grpc.RpcError as error:
            raise self._error(error) from None
        except (ValueError, grpc.FutureCancelledError) as error:  # a channel that was closed meanwhile
            raise HostUnavailable(f"{self._host.id} at {self._host.address}: {error}") from None
        return answer

    def _wait(self, name: str, pending: Any) -> bytes:
        if self._supervisor is None:
            return bytes(pending.result())
        waiting = Waiting(self._supervisor, self._host, name, CALL_TIMEOUT_S)
        try:
            while True:
                with contextlib.suppress(grpc.FutureTimeoutError):
                    return bytes(pending.result(LOOK_S))
                waiting.still()
        finally:
            pending.cancel()  # which changes nothing once it is answered

    def _error(self, error: grpc.RpcError) -> ExpertError:
        code = error.code() if isinstance(error, grpc.Call) else None
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            return parse_refusal(error.details().encode())
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            return CallRefused(f"{self._host.id}: {error.details()}")
        return HostUnavailable(f"{self._host.id} at {self._host.address}: {describe(error)}")


class GrpcPeers:
    """Peers by (id, generation, address), each opened on first use and again after it was forgotten."""

    def __init__(
        self, token: str | None = None, tls: TlsFiles | None = None, supervisor: Supervisor | None = None
    ) -> None:
        """`supervisor` hears of hosts that do not answer; without one, calls wait."""
        self._supervisor = supervisor
        self._token = token
        self._tls = tls
        self._peers: dict[Host, GrpcPeer] = {}
        self._lock = threading.Lock()

    def peer(self, host: Host) -> GrpcPeer:
        with self._lock:
            if host not in self._peers:
                self._peers[host] = GrpcPeer(host, self._token, self._tls, self._supervisor)
            return self._peers[host]

    def fetch(self, host: Host, pairs: Sequence[Pair]) -> Iterator[bytes]:
        """States of another host's experts, over a connection of their own."""
        peer = GrpcPeer(host, self._token, self._tls)
        try:
            yield from peer.states(pairs)
        finally:
            peer.close()

    def forget(self, host: Host) -> None:
        with self._lock:
            peer = self._peers.pop(host, None)
        if peer is not None:
            peer.close()

    def close(self) -> None:
        with self._lock:
            peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            peer.close()
