"""Experts between hosts: what arrives is what is held, bit for bit, or it is refused by name."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from experts.errors import TransferFailed
from experts.fetch import fetch
from experts.grpc_server import ExpertServer
from experts.host import ExpertHost
from experts.transfer import (
    DIGEST_BYTES,
    MAX_REQUEST_BYTES,
    METHOD,
    ExpertForm,
    decode_expert,
    decode_request,
    encode_expert,
    encode_request,
)
from experts.wire import TOKEN_KEY, identity
from model.checkpoint import Checkpoint, ExpertWeights
from router.placement import Host
from tests.certificates import make_certificate
from tests.experts.host_process import HostProcess

TOKEN = "the-token-of-this-service"
FORM = ExpertForm(256, 96, torch.float32)
SMALL = ExpertForm(6, 4, torch.float32)
PAIRS = [(1, 3), (1, 0), (2, 5)]


def draw(form: ExpertForm = SMALL, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    return ExpertWeights(
        **{name: torch.randn(s, generator=generator).to(form.dtype) for name, s in form.shapes.items()}
    )


def same(one: ExpertWeights, other: ExpertWeights) -> bool:
    return all(
        ours.dtype == theirs.dtype and ours.contiguous().numpy().tobytes() == theirs.contiguous().numpy().tobytes()
        for ours, theirs in zip(
            (one.gate_proj, one.up_proj, one.down_proj), (other.gate_proj, other.up_proj, other.down_proj), strict=True
        )
    )


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("tiny"))


@pytest.fixture(scope="module")
def host(opened: Checkpoint) -> ExpertHost:
    made = ExpertHost(opened.config, "host-0", 1)
    made.load(opened, PAIRS)
    return made


@pytest.fixture
def server(host: ExpertHost) -> Iterator[ExpertServer]:
    made = ExpertServer(host, token=TOKEN)
    made.start()
    yield made
    made.stop(0)


def at(server: ExpertServer, generation: int = 1) -> Host:
    return Host("host-0", generation, server.address)


def test_a_message_is_a_digest_and_a_safetensors_file() -> None:
    weights = draw()
    message = encode_expert((7, 11), weights)
    assert hashlib.sha256(message[DIGEST_BYTES:]).digest() == message[:DIGEST_BYTES]
    read = load(message[DIGEST_BYTES:])
    assert read.keys() == {"gate_proj", "up_proj", "down_proj"}
    assert same(ExpertWeights(**read), weights)
    assert b'"__metadata__":{"layer":"7","expert":"11"}' in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_expert_survives_in_every_dtype(dtype: torch.dtype) -> None:
    form = replace(SMALL, dtype=dtype)
    weights = draw(form)
    got = decode_expert(encode_expert((1, 2), weights), (1, 2), form)
    for name in form.shapes:
        assert getattr(got, name).dtype == dtype
        assert torch.equal(getattr(got, name), getattr(weights, name))


def test_odd_numbers_and_shared_or_slanted_memory_survive() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]).repeat(12).view(8, 6)
    gate, up = odd.chunk(2)
    weights = ExpertWeights(gate, up, torch.randn(4, 6).T)
    assert same(decode_expert(encode_expert((1, 2), weights), (1, 2), SMALL), weights)


@settings(max_examples=200)
@given(st.data())
def test_no_damaged_byte_is_taken(data: st.DataObject) -> None:
    message = bytearray(encode_expert((1, 2), draw()))
    message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TransferFailed, match=r"digest|header"):
        decode_expert(bytes(message), (1, 2), SMALL)


def test_what_is_another_expert_or_another_form_is_named() -> None:
    message = encode_expert((1, 2), draw())
    with pytest.raises(TransferFailed, match=r'"expert":"2".*expected.*"expert":"3"'):
        decode_expert(message, (1, 3), SMALL)
    with pytest.raises(TransferFailed, match=r'"layer":"1".*expected.*"layer":"2"'):
        decode_expert(message, (2, 2), SMALL)
    with pytest.raises(TransferFailed, match=r"\[4,6\].*expected.*\[6,4\]"):
        decode_expert(message, (1, 2), ExpertForm(4, 6, torch.float32))
    with pytest.raises(TransferFailed, match=r"F32.*expected.*BF16"):
        decode_expert(message, (1, 2), replace(SMALL, dtype=torch.bfloat16))


@pytest.mark.parametrize("length", [0, 1, 32, 100, -1])
def test_a_message_that_is_cut_short_is_refused(length: int) -> None:
    message = encode_expert((1, 2), draw())
    with pytest.raises(TransferFailed):
        decode_expert(message[:length], (1, 2), SMALL)


def test_bytes_behind_the_weights_are_refused() -> None:
    body = encode_expert((1, 2), draw())[DIGEST_BYTES:] + b"more"
    with pytest.raises(TransferFailed, match=r"bytes; expected"):
        decode_expert(hashlib.sha256(body).digest() + body, (1, 2), SMALL)


def test_a_file_of_other_names_is_refused_though_its_digest_fits() -> None:
    body = save({"weight": torch.zeros(6, 12)}, {"layer": "1", "expert": "2"})
    with pytest.raises(TransferFailed, match="header"):
        decode_expert(hashlib.sha256(body).digest() + body, (1, 2), SMALL)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"noise",
        b"[]",
        b"[" * 100_000,
        b'{"generation":1}',
        b'{"generation":1,"pairs":[]}',
        b'{"generation":-1,"pairs":[[1,2]]}',
        b'{"generation":"1","pairs":[[1,2]]}',
        b'{"generation":1,"pairs":[[1,2,3]]}',
        b'{"generation":1,"pairs":[[1,2.5]]}',
        b'{"generation":1,"pairs":[[1,2]],"more":1}',
        b'{"generation":1,"pairs":[' + b"[1,2]," * 65_536 + b"[1,2]]}",
        b" " * (MAX_REQUEST_BYTES + 1),
    ],
)
def test_what_is_no_request_is_refused(text: bytes, server: ExpertServer) -> None:
    with pytest.raises(TransferFailed, match="fetch request"):
        decode_request(text)
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_stream(METHOD, identity, identity)(text, metadata=((TOKEN_KEY, TOKEN),))
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "fetch request" in caught.value.details()


def test_a_request_survives() -> None:
    request = decode_request(encode_request(4, PAIRS))
    assert (request.generation, list(request.pairs)) == (4, PAIRS)


def test_a_host_hands_over_what_it_holds_in_the_order_asked_for(
    opened: Checkpoint, server: ExpertServer, host: ExpertHost
) -> None:
    got = list(fetch(at(server), PAIRS, FORM, TOKEN))
    assert [pair for pair, _ in got] == PAIRS
    for pair, weights in got:
        assert same(weights, host.weights(*pair))
        assert same(weights, opened.expert(*pair))


def test_what_is_not_held_or_another_life_is_refused_by_name(server: ExpertServer) -> None:
    with pytest.raises(TransferFailed, match=r"FAILED_PRECONDITION: host-0 does not hold 1 of .*\(1, 4\)"):
        next(fetch(at(server), [(1, 3), (1, 4)], FORM, TOKEN))
    with pytest.raises(TransferFailed, match=r"host-0 at .*FAILED_PRECONDITION: host-0 is in generation 1; .* for 2"):
        next(fetch(at(server, 2), PAIRS, FORM, TOKEN))


def test_an_expert_that_goes_while_others_are_sent_is_refused(
    opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ExpertHost(opened.config, "host-0", 1)
    host.load(opened, PAIRS)
    server = ExpertServer(host)
    server.start()
    monkeypatch.setattr(
        "experts.grpc_server.encode_expert",
        lambda pair, weights: (host.unload({(2, 5)} & set(host.held)), encode_expert(pair, weights))[1],
    )
    received = fetch(at(server), PAIRS, FORM)
    assert [next(received)[0], next(received)[0]] == PAIRS[:2]
    with pytest.raises(TransferFailed, match="does not hold expert 5 of layer 2"):
        next(received)
    server.stop(0)


@pytest.mark.parametrize("token", [None, "another"])
def test_the_door_needs_the_token(server: ExpertServer, token: str | None) -> None:
    with pytest.raises(TransferFailed, match=r"UNAUTHENTICATED.*token"):
        next(fetch(at(server), PAIRS, FORM, token))


def test_tls_lets_in_who_has_the_certificate_and_nobody_else(
    host: ExpertHost, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = make_certificate(tmp_path_factory.mktemp("ours"))
    others = make_certificate(tmp_path_factory.mktemp("theirs"))
    server = ExpertServer(host, token=TOKEN, tls=files)
    server.start()
    assert len(list(fetch(at(server), PAIRS, FORM, TOKEN, files))) == len(PAIRS)
    for outsider in (others, None):
        with pytest.raises(TransferFailed):
            next(fetch(at(server), PAIRS, FORM, TOKEN, outsider))
    server.stop(0)


def test_nobody_listening_is_said() -> None:
    with pytest.raises(TransferFailed, match=r"host-9 at 127\.0\.0\.1:1: UNAVAILABLE"):
        next(fetch(Host("host-9", 1, "127.0.0.1:1"), PAIRS, FORM))


def test_a_host_that_falls_silent_is_given_up(server: ExpertServer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def encode(pair: tuple[int, int], weights: ExpertWeights) -> bytes:
        if pair == PAIRS[1]:
            go_on.wait(20)
        return encode_expert(pair, weights)

    monkeypatch.setattr("experts.grpc_server.encode_expert", encode)
    received = fetch(at(server), PAIRS, FORM, TOKEN, timeout_s=0.3)
    assert next(received)[0] == PAIRS[0]
    with pytest.raises(TransferFailed, match=r"expert 0 of layer 1 did not come in 0\.3 s"):
        next(received)
    go_on.set()


def test_a_frozen_process_is_given_up(checkpoint: Callable[[str], Path]) -> None:
    source = HostProcess(checkpoint("tiny"), TOKEN, "grpc")
    try:
        assert len(list(fetch(source.host, [(1, 0), (1, 1)], FORM, TOKEN))) == 2
        source.freeze()
        with pytest.raises(TransferFailed, match=r"did not come in 0\.3 s"):
            next(fetch(source.host, [(1, 0)], FORM, TOKEN, timeout_s=0.3))
        source.thaw()
        assert len(list(fetch(source.host, [(1, 2)], FORM, TOKEN))) == 1
    finally:
        source.end()


def test_a_stream_that_ends_early_is_noticed(server: ExpertServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(self: ExpertServer, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for pair in PAIRS[:2]:
            yield encode_expert(pair, self._host.weights(*pair))

    monkeypatch.setattr(ExpertServer, "_fetch", two)
    received = fetch(at(server), PAIRS, FORM, TOKEN)
    assert [next(received)[0], next(received)[0]] == PAIRS[:2]
    with pytest.raises(TransferFailed, match="ended before expert 5 of layer 2"):
        next(received)


def test_a_receiver_that_goes_away_stops_the_sending(server: ExpertServer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    gone = threading.Event()

    def encode(pair: tuple[int, int], weights: ExpertWeights) -> bytes:
        sent.append(pair)
        assert len(sent) == 1 or gone.wait(20)
        return encode_expert(pair, weights)

    monkeypatch.setattr("experts.grpc_server.encode_expert", encode)
    received = fetch(at(server), PAIRS * 1000, FORM, TOKEN)
    next(received)
    received.close()
    gone.set()
    assert len(list(fetch(at(server), PAIRS, FORM, TOKEN))) == len(PAIRS)  # the door is free
    server.stop(0)
    assert len(sent) < 100
