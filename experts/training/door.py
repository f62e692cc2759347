"""A training host's methods on gRPC, beside those of every host: backward as a stream, the rest as single calls.

Single calls are JSON both ways. A HostRefused is FAILED_PRECONDITION with its code and message; what is malformed, or
does not fit, is INVALID_ARGUMENT.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from experts.errors import ExpertError, FrameError, HostRefused, TransferFailed
from experts.frames import refusal_payload
from experts.training.blocks import Layout, Mapped
from experts.training.frames import (
    SHARED,
    Header,
    decode_header,
    decode_request,
    encode_refusal,
    encode_reply,
    encode_shared_reply,
    request_in,
    shared_address,
)
from experts.training.host import TrainingHost
from experts.training.messages import BackwardReply
from experts.training.spec import ExpertTraining, as_pairs
from experts.training.states import decode_state, encode_state, load_states, save_states
from model.checkpoint import Checkpoint
from model.snapshots.snapshot import Snapshot
from router.holding import Pair
from router.placement import Host

SERVICE = "/shoal.Training/"
Json = dict[str, Any]
Fetch = Callable[[Host, Sequence[Pair]], Iterator[bytes]]  # states of another host's experts


class TrainingDoor:
    """`fetch` reaches other hosts."""

    def __init__(self, host: TrainingHost, checkpoint: Checkpoint, fetch: Fetch) -> None:
        self._host = host
        self._checkpoint = checkpoint
        self._fetch = fetch
        self._calls: Mapping[str, Callable[[Json], Json]] = {
            "Configure": self._configure,
            "Status": self._status,
            "Begin": self._begin,
            "Norms": self._norms,
            "Apply": self._apply,
            "Pull": self._pull,
            "Restart": self._restart,
            "Save": self._save,
            "Load": self._load,
        }

    def handler(self, method: str, check: Callable[[grpc.ServicerContext], None]) -> grpc.RpcMethodHandler | None:
        """What answers a method, once `check` let the caller in; None for one that is not training's."""
        name = method.removeprefix(SERVICE) if method.startswith(SERVICE) else ""
        if name == "Backward":

            def backward(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
                check(context)
                return self._backwards(frames)

            return grpc.stream_stream_rpc_method_handler(backward, bytes, bytes)
        if name == "States":

            def states(message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
                check(context)
                return self._states(message, context)

            return grpc.unary_stream_rpc_method_handler(states, bytes, bytes)
        call = self._calls.get(name)
        if call is None:
            return None

        def answer(message: bytes, context: grpc.ServicerContext) -> bytes:
            check(context)
            return self._answer(call, message, context)

        return grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)

    def _answer(self, call: Callable[[Json], Json], message: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return json.dumps(call(json.loads(message))).encode()
        except HostRefused as refusal:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal_payload(refusal).decode(errors="replace"))
        except (ValueError, KeyError, TypeError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{type(error).__name__}: {error}")
        except ExpertError as error:  # another host did not hand over what was asked of it
            context.abort(grpc.StatusCode.ABORTED, str(error))
        raise AssertionError("abort raises")

    def _backwards(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        mapped = Mapped()
        for frame in frames:
            yield self._backward(frame, mapped)
            self._host.settle()  # gRPC comes back for more once the reply is on its way

    def _backward(self, frame: bytes, mapped: Mapped) -> bytes:
        correlation = 0
        try:
            header = decode_header(frame)
            correlation = header.correlation
            if header.kind == SHARED:
                return encode_shared_reply(self._backward_shared(header, shared_address(frame), mapped), correlation)
            return encode_reply(self._host.backward(decode_request(header, frame)), correlation)
        except FrameError as error:
            return encode_refusal(HostRefused("bad_request", str(error)), correlation)
        except HostRefused as refusal:
            return encode_refusal(refusal, correlation)
        except (RuntimeError, MemoryError) as error:  # torch's own: no memory, a device that failed
            return encode_refusal(HostRefused("failed", f"{self._host.host.host_id}: {error}"), correlation)

    def _backward_shared(self, header: Header, address: str, mapped: Mapped) -> BackwardReply:
        layout = Layout(header.rows, header.hidden, header.pairs)
        memory = mapped.at(address, layout.nbytes)
        return self._host.backward(request_in(header, memory), lambda answered: layout.answer(memory, answered))

    def _states(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            raw = json.loads(message)
            generation, pairs = int(raw["generation"]), as_pairs(raw["pairs"])
            self._check_generation(generation)
        except HostRefused as refusal:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal_payload(refusal).decode(errors="replace"))
        except (ValueError, KeyError, TypeError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{type(error).__name__}: {error}")
        for pair in pairs:
            try:
                with self._host.reading():
                    version, state = self._host.state(pair)
                    packed = encode_state(pair, version, state)
            except KeyError as error:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"not_held\n{error.args[0]}")
            yield packed

    def _configure(self, raw: Json) -> Json:
        self._check_generation(raw["generation"])
        self._host.configure(ExpertTraining.from_json(raw["training"]))
        return {}

    def _status(self, raw: Json) -> Json:
        self._check_generation(raw["generation"])
        state = self._host.status()
        versions = [(*pair, version) for pair, version in state.versions.items()]
        return {"run_id": state.run_id, "versions": versions}

    def _begin(self, raw: Json) -> Json:
        self._check_generation(raw["generation"])
        self._host.begin(raw["step"], raw["micros"], raw["ranks"], as_pairs(raw["pairs"]))
        return {}

    def _norms(self, raw: Json) -> Json:
        self._check_generation(raw["generation"])
        norms = self._host.squared_norms(raw["step"])
        return {"norms": [(*pair, squared) for pair, squared in norms.items()]}

    def _apply(self, raw: Json) -> Json:
        self._check_generation(raw["generation"])
        self._host.apply(raw["step"], raw["learning_rate"], raw["grad_scale"])
        return {}

    def _pull(self, raw: Json) -> Json:
        self._check_generation(raw["generation"])
        pairs = as_pairs(raw["pairs"])
        for wanted, message in zip(pairs, self._fetch(Host(**raw["source"]), pairs), strict=True):
            pair, version, state = decode_state(message)
            if pair != wanted:
                raise TransferFailed(f"expert {pair} came where {wanted} was asked for")
            self._host.adopt(pair, version, state)
        return {}

    def _restart(self, raw: Json) -> Json:
        self._check_generation(raw["generation"])
        self._host.restart(self._checkpoint, as_pairs(raw["pairs"]))
        return {}

    def _save(self, raw: Json) -> Json:
        self._check_generation(raw["generation"])
        shards = save_states(self._host, Path(raw["staging"]), as_pairs(raw["pairs"]), raw["step"])
        return {"shards": [(shard.name, shard.nbytes, shard.sha256, shard.tensors) for shard in shards]}

    def _load(self, raw: Json) -> Json:
        self._check_generation(raw["generation"])
        load_states(self._host, self._checkpoint, Snapshot.open(Path(raw["snapshot"])), as_pairs(raw["pairs"]))
        return {}

    def _check_generation(self, generation: int) -> None:
        host = self._host.host
        if generation != host.generation:
            reason = f"{host.host_id} is in generation {host.generation}; the call was for {generation}"
            raise HostRefused("wrong_generation", reason)
