"""Hosts behind gRPC: the same bits, doors that need the token, and failures that stay with their sender."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
import torch

from experts.errors import FrameError, HostRefused, HostUnavailable
from experts.frames import decode_header, decode_reply, encode_request
from experts.grpc_server import ExpertServer
from experts.grpc_transport import GrpcTransport
from experts.host import ExpertHost
from experts.messages import ForwardReply, ForwardRequest
from experts.tls import TlsFiles
from experts.wire import METHOD, TOKEN_KEY, identity
from model.checkpoint import Checkpoint
from router.placement import Host
from tests.certificates import make_certificate

TOKEN = "the-token-of-this-service"


@pytest.fixture(scope="module")
def host(checkpoint: Callable[[str], Path]) -> ExpertHost:
    opened = Checkpoint.open(checkpoint("tiny"))
    made = ExpertHost(opened.config, "host-0", 1)
    made.load(opened, [(1, expert) for expert in range(16)])
    return made


@pytest.fixture
def server(host: ExpertHost) -> Iterator[ExpertServer]:
    made = ExpertServer(host, token=TOKEN)
    made.start()
    yield made
    made.stop(0)


@pytest.fixture
def transport() -> Iterator[GrpcTransport]:
    made = GrpcTransport(TOKEN)
    yield made
    made.close()


def request(rows: int = 4, seed: int = 0) -> ForwardRequest:
    x_RD = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))
    return ForwardRequest(1, 1, 1, x_RD, torch.arange(rows).int(), (torch.arange(rows) % 16).int())


def at(server: ExpertServer) -> Host:
    return Host("host-0", 1, server.address)


def test_the_bits_are_those_of_a_call_in_process(
    host: ExpertHost, server: ExpertServer, transport: GrpcTransport
) -> None:
    for rows in (1, 7, 300):
        reply = transport.submit(at(server), request(rows)).result(10)
        assert torch.equal(reply.y_PD, host.forward(request(rows)).y_PD)


def test_rows_are_said_to_go_by_grpc_to_whoever_was_asked(server: ExpertServer, transport: GrpcTransport) -> None:
    assert transport.ways() == {}
    transport.submit(at(server), request()).result(10)
    assert transport.ways() == {at(server): "grpc"}
    transport.forget(at(server))
    assert transport.ways() == {}


def test_replies_find_their_calls_among_many(host: ExpertHost, server: ExpertServer, transport: GrpcTransport) -> None:
    pending = [transport.submit(at(server), request(3, seed)) for seed in range(20)]
    for seed, call in reversed(list(enumerate(pending))):
        assert torch.equal(call.result(10).y_PD, host.forward(request(3, seed)).y_PD)


@pytest.mark.parametrize("token", [None, "another"])
def test_the_door_needs_the_token(server: ExpertServer, token: str | None) -> None:
    stranger = GrpcTransport(token)
    with pytest.raises(HostUnavailable, match="token"):
        stranger.submit(at(server), request()).result(10)
    stranger.close()


def test_a_refusal_arrives_and_the_stream_lives_on(server: ExpertServer, transport: GrpcTransport) -> None:
    wrong = ForwardRequest(1, 9, 1, torch.zeros(1, 256), torch.zeros(1).int(), torch.zeros(1).int())
    with pytest.raises(HostRefused, match=r"^wrong_generation: "):
        transport.submit(at(server), wrong).result(10)
    assert transport.submit(at(server), request()).result(10).y_PD.shape == (4, 256)


def test_a_lying_frame_costs_its_sender_one_call(
    host: ExpertHost, server: ExpertServer, transport: GrpcTransport
) -> None:
    good = encode_request(request(), 5)
    lying = good[:48] + (2**31).to_bytes(4, "little") + good[52:]
    before = transport.submit(at(server), request(300))
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(METHOD, identity, identity)
        answers = call(iter([lying, b"", b"noise" * 50, good]), metadata=((TOKEN_KEY, TOKEN),))
        for _ in range(3):
            frame = next(answers)
            with pytest.raises(HostRefused) as refused:
                decode_reply(decode_header(frame), frame)
            assert refused.value.code == "bad_request"
        frame = next(answers)
        assert torch.equal(decode_reply(decode_header(frame), frame).y_PD, host.forward(request()).y_PD)
    assert torch.equal(before.result(10).y_PD, host.forward(request(300)).y_PD)


class Stuck(ExpertHost):
    """A host that never answers."""

    entered = threading.Event()
    let_go = threading.Event()

    def forward_batch(
        self, requests: Sequence[ForwardRequest], outs: Sequence[torch.Tensor | None] | None = None
    ) -> list[ForwardReply | HostRefused]:
        self.entered.set()
        self.let_go.wait(20)
        return super().forward_batch(requests, outs)


def test_a_host_that_goes_away_is_noticed_at_once(host: ExpertHost, transport: GrpcTransport) -> None:
    stuck = Stuck(host._config, "host-0", 1)
    server = ExpertServer(stuck, token=TOKEN)
    server.start()
    call = transport.submit(at(server), request())
    assert stuck.entered.wait(10)
    stopper = threading.Thread(target=server.stop, args=(0,))
    stopper.start()
    with pytest.raises(HostUnavailable, match="host-0") as caught:
        call.result(30)
    assert "no reply" not in str(caught.value)  # it did not wait for the timeout
    stuck.let_go.set()
    stopper.join()


def test_a_host_that_is_silent_is_given_up_after_the_timeout(
    host: ExpertHost, server: ExpertServer, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence = threading.Event()
    forward_batch = host.forward_batch

    def wait(
        requests: Sequence[ForwardRequest], outs: Sequence[torch.Tensor | None]
    ) -> list[ForwardReply | HostRefused]:
        silence.wait(20)
        return forward_batch(requests, outs)

    monkeypatch.setattr(host, "forward_batch", wait)
    call = transport.submit(at(server), request())
    with pytest.raises(HostUnavailable, match=r"no reply in 0\.2 s"):
        call.result(0.2)
    silence.set()


def test_nobody_listening_is_unavailable(transport: GrpcTransport) -> None:
    with pytest.raises(HostUnavailable):
        transport.submit(Host("host-9", 1, "127.0.0.1:1"), request()).result(10)


def test_a_new_life_on_the_same_address_is_reached(host: ExpertHost, transport: GrpcTransport) -> None:
    first = ExpertServer(host, token=TOKEN)
    first.start()
    assert transport.submit(at(first), request()).result(10).generation == 1
    first.stop(0)
    second = ExpertServer(host, bind=first.address, token=TOKEN)
    second.start()
    transport.forget(at(first))
    reply = transport.submit(at(second), request()).result(10)
    assert reply.y_PD.shape == (4, 256)
    second.stop(0)


def test_tls_lets_in_who_has_the_certificate_and_nobody_else(
    host: ExpertHost, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = make_certificate(tmp_path_factory.mktemp("ours"))
    others = make_certificate(tmp_path_factory.mktemp("theirs"))
    server = ExpertServer(host, token=TOKEN, tls=files)
    server.start()
    friend, stranger, plain = GrpcTransport(TOKEN, files), GrpcTransport(TOKEN, others), GrpcTransport(TOKEN)
    assert torch.equal(friend.submit(at(server), request()).result(10).y_PD, host.forward(request()).y_PD)
    for outsider in (stranger, plain):
        with pytest.raises(HostUnavailable):
            outsider.submit(at(server), request()).result(10)
    for each in (friend, stranger, plain):
        each.close()
    server.stop(0)


def test_a_missing_tls_file_is_named(host: ExpertHost, tmp_path: Path) -> None:
    nowhere = TlsFiles(tmp_path / "a.pem", tmp_path / "a.key", tmp_path / "root.pem")
    with pytest.raises(ValueError, match=r"a\.key: No such file"):
        ExpertServer(host, tls=nowhere)


def test_a_request_over_the_caps_is_not_waited_for(server: ExpertServer, transport: GrpcTransport) -> None:
    wide = ForwardRequest(1, 1, 1, torch.empty(0, 1 << 17), torch.zeros(0).int(), torch.zeros(0).int())
    for _ in range(3):
        with pytest.raises(FrameError, match="over the caps"):
            transport.submit(at(server), wide)
    assert not transport._streams[at(server)]._calls


def test_a_stopped_server_leaves_no_thread(host: ExpertHost, transport: GrpcTransport) -> None:
    server = ExpertServer(host, token=TOKEN)
    server.start()
    transport.submit(at(server), request()).result(10)
    streams = [each for each in threading.enumerate() if each.name.startswith("expert-stream")]
    server.stop(0)
    for thread in streams:
        thread.join(10)
    assert streams
    assert not any(thread.is_alive() for thread in streams)
