"""Training over gRPC: the bits of one process, states on their way, and strangers and damaged frames kept out."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest
import torch

from experts.errors import FrameError, HostRefused, HostSlow, HostUnavailable, TransferFailed
from experts.grpc_stream import StreamCall
from experts.training.blocks import Blocks, Layout, Mapped, SharedCall, layout_of
from experts.training.frames import (
    SHARED,
    SharedAnswer,
    decode_answer,
    decode_header,
    decode_request,
    encode_reply,
    encode_request,
    encode_shared,
    encode_shared_reply,
    request_in,
    shared_address,
)
from experts.training.grpc_peer import GrpcPeers
from experts.training.messages import BackwardReply, BackwardRequest
from experts.training.spec import ExpertTraining, LowRank
from experts.training.states import decode_state, encode_state
from experts.training.step_hosts import StepLost
from model.checkpoint import Checkpoint
from model.snapshots.attempt import begin, commit
from model.snapshots.manifest import Manifest
from router.placement import Host
from tests.training.rig import Doors, make_host, make_rig
from tests.training.test_steps import same, train, weights


@pytest.fixture
def doors(checkpoint: Callable[[str], Path]) -> Iterator[Doors]:
    made = Doors(Checkpoint.open(checkpoint("mini")))
    yield made
    made.close()


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was answered to backward calls that offered memory."""
    seen: list[str] = []
    result = SharedCall.result

    def watch(this: SharedCall, timeout_s: float) -> BackwardReply:
        reply = result(this, timeout_s)
        seen.append("frame" if this._plain is not None else "shared")
        return reply

    monkeypatch.setattr(SharedCall, "result", watch)
    return seen


@pytest.mark.parametrize("way", ["shared", "frames", "refused"])
@pytest.mark.parametrize(("hosts", "replicas", "workers"), [(2, 1, 1), (3, 2, 2)])
def test_the_way_to_the_hosts_changes_no_bit(
    checkpoint: Callable[[str], Path],
    doors: Doors,
    replies: list[str],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    hosts: int,
    replicas: int,
    workers: int,
) -> None:
    monkeypatch.setattr("experts.training.grpc_peer.LEAST_BYTES", 1 << 40 if way == "frames" else 1)
    if way == "refused":
        monkeypatch.setattr("experts.training.blocks.map_shared", lambda address, nbytes: None)
    near = make_rig(checkpoint("mini"), hosts, replicas, workers, clip=1.0)
    far = make_rig(checkpoint("mini"), hosts, replicas, workers, clip=1.0, doors=doors)
    assert train(near, 2) == train(far, 2)
    assert same(weights(near), weights(far))
    if way == "frames":
        assert replies == []
    else:
        assert set(replies) == {"shared" if way == "shared" else "frame"}
    if way == "shared":
        free = [len(doors.peers.peer(host)._blocks._free) for host in far.table.placement.hosts]  # type: ignore[union-attr]
        assert min(free) >= 1  # they were given back, and used again
        assert len(replies) > sum(free)


def test_a_joining_host_takes_states_from_its_peers(checkpoint: Callable[[str], Path], doors: Doors) -> None:
    expected = train(make_rig(checkpoint("mini"), 2, clip=1.0), 3)
    rig = make_rig(checkpoint("mini"), 2, clip=1.0, doors=doors)

    def move(step: int) -> None:
        if step != 1:
            return
        table = rig.table.placement
        held = table.held_by("host-1")
        life = Host("host-2", 1, "local")
        rig.expert_hosts["host-2"], rig.hosts["host-2"] = make_host(rig.checkpoint, life, held)
        life = doors.open(life, rig.expert_hosts["host-2"], rig.hosts["host-2"])
        rig.table.placement = replace(table, epoch=table.epoch + 1, hosts=(table.hosts[0], life))

    assert train(rig, 3, move) == expected


def test_factors_are_saved_and_loaded_again(checkpoint: Callable[[str], Path], doors: Doors, tmp_path: Path) -> None:
    training = ExpertTraining("run", lora=LowRank(3, 6.0))
    trained = make_rig(checkpoint("mini"), 2, training=training, doors=doors)
    train(trained, 2)
    first, later = trained.workers[0]._coordinator, make_rig(checkpoint("mini"), 3, training=training, doors=doors)
    second = later.workers[0]._coordinator
    assert first is not None
    assert second is not None
    staging = begin(tmp_path, 2)
    shards = tuple(first.save(trained.clients[0].hosts, staging, 2))
    written = commit(
        staging, Manifest(step=2, run_id="r", fingerprint="f", position={}, recipe={}, rng={}, shards=shards)
    )
    second.load(later.table.placement, written)
    found, wanted = weights(later), weights(trained)
    experts = [name for name in wanted if not name.startswith("model.") and name != "lm_head.weight"]
    assert any(name.endswith("lora_B.square") for name in experts)
    assert all(torch.equal(found[name], wanted[name]) for name in experts)
    assert {version for host in later.hosts.values() for version in host.status().versions.values()} == {2}


def test_a_host_without_the_token_or_of_another_life_is_not_asked(
    checkpoint: Callable[[str], Path], doors: Doors
) -> None:
    rig = make_rig(checkpoint("mini"), 1, doors=doors)
    (host,) = rig.table.placement.hosts
    strangers = GrpcPeers("another")
    with pytest.raises(HostUnavailable, match="UNAUTHENTICATED"):
        strangers.peer(host).status()
    strangers.close()
    with pytest.raises(HostRefused, match=r"^wrong_generation: "):
        doors.peers.peer(replace(host, generation=2)).status()
    with pytest.raises(HostRefused, match=r"^not_ready: host-0: no training run"):
        doors.peers.peer(host).apply(0, 1e-3, 1.0)
    assert doors.peers.peer(host).status().run_id is None


@pytest.mark.parametrize("message", [b"", b"\xff", b"[]", b"{}", b'{"generation": 1, "pairs": [["a", 1]]}'])
@pytest.mark.parametrize("name", ["Configure", "Begin", "Norms", "Apply", "Pull", "Restart", "Save", "Load", "States"])
def test_malformed_calls_are_refused_and_harm_nothing(
    checkpoint: Callable[[str], Path], doors: Doors, name: str, message: bytes
) -> None:
    rig = make_rig(checkpoint("mini"), 1, doors=doors)
    (host,) = rig.table.placement.hosts
    with grpc.insecure_channel(host.address) as channel, pytest.raises(grpc.RpcError) as error:
        list(
            channel.unary_stream(f"/shoal.Training/{name}", bytes, bytes)(
                message, metadata=(("shoal-token", "the-token-of-this-run"),), timeout=10
            )
        )
    assert error.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    assert len(train(rig, 1)) == 1


def request(rows: int = 3, pairs: int = 5) -> BackwardRequest:
    generator = torch.Generator().manual_seed(1)
    return BackwardRequest(
        generation=7,
        step=5,
        micro=1,
        rank=2,
        layer=3,
        x_RD=torch.randn(rows, 8, generator=generator),
        dout_RD=torch.randn(rows, 8, generator=generator),
        pair_row_P=torch.arange(pairs, dtype=torch.int32) % max(rows, 1),
        pair_expert_P=torch.arange(pairs, dtype=torch.int32),
        pair_weight_P=torch.rand(pairs, generator=generator),
        answer_P=(torch.arange(pairs) % 2).int(),
    )


@pytest.mark.parametrize(("rows", "pairs"), [(3, 5), (1, 1), (0, 0)])
def test_frames_say_what_was_meant(rows: int, pairs: int) -> None:
    sent = request(rows, pairs)
    frame = encode_request(sent, 11)
    header = decode_header(frame)
    got = decode_request(header, frame)
    assert header.correlation == 11
    for name in ("generation", "step", "micro", "rank", "layer"):
        assert getattr(got, name) == getattr(sent, name)
    for name in ("x_RD", "dout_RD", "pair_row_P", "pair_expert_P", "pair_weight_P", "answer_P"):
        assert torch.equal(getattr(got, name), getattr(sent, name))
    reply = BackwardReply(7, torch.randn(pairs, 8), torch.randn(pairs))
    correlation, read = decode_answer(encode_reply(reply, 12))
    assert correlation == 12
    got_reply = read()
    assert isinstance(got_reply, BackwardReply)
    assert torch.equal(got_reply.dx_AD, reply.dx_AD)
    assert torch.equal(got_reply.dweight_A, reply.dweight_A)


@pytest.mark.parametrize("sent", [encode_request(request(), 11), encode_shared(request(), "shoal-x/1/2", 11)])
def test_every_damaged_byte_of_a_frame_is_found(sent: bytes) -> None:
    frame = sent
    for place in range(len(frame)):
        if 68 <= place < 72:
            continue  # nothing
        damaged = bytearray(frame)
        damaged[place] ^= 0x10
        with pytest.raises(FrameError):
            decode_header(bytes(damaged))
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode_header(frame[:length])


@pytest.mark.parametrize(("rows", "pairs"), [(3, 5), (1, 1), (0, 0)])
def test_a_block_says_what_was_meant(rows: int, pairs: int) -> None:
    sent = request(rows, pairs)
    layout = layout_of(sent)
    block = Blocks().take(layout.nbytes)
    layout.write(block.memory, sent)
    frame = encode_shared(sent, block.address, 11)
    header = decode_header(frame)
    assert (header.kind, header.correlation, shared_address(frame)) == (SHARED, 11, block.address)
    memory = Mapped().at(block.address, layout.nbytes)
    got = request_in(header, memory)
    for name in ("generation", "step", "micro", "rank", "layer"):
        assert getattr(got, name) == getattr(sent, name)
    for name in ("x_RD", "dout_RD", "pair_row_P", "pair_expert_P", "pair_weight_P", "answer_P"):
        assert torch.equal(getattr(got, name), getattr(sent, name))
    dx_AD, dweight_A = layout.answer(memory, pairs)
    dx_AD.copy_(torch.randn(pairs, 8))
    dweight_A.copy_(torch.randn(pairs))
    read = layout.answer(block.memory, pairs)
    assert torch.equal(read[0], dx_AD)
    assert torch.equal(read[1], dweight_A)
    assert torch.equal(request_in(header, memory).x_RD, sent.x_RD)
    reply = BackwardReply(7, dx_AD, dweight_A)
    assert decode_answer(encode_shared_reply(reply, 12))[1]() == SharedAnswer(7, pairs, 8)


def test_memory_that_is_no_block_is_refused_and_the_next_call_served(
    checkpoint: Callable[[str], Path], doors: Doors
) -> None:
    rig = make_rig(checkpoint("mini"), 1, doors=doors)
    (host,) = rig.table.placement.hosts
    sent = replace(request(), generation=1)
    small, twice = Blocks().take(1), Blocks().take(1)
    layout_of(sent).write(twice.memory, replace(sent, answer_P=torch.full((5,), 2, dtype=torch.int32)))
    wide = replace(sent, x_RD=torch.zeros(3, 60_000), dout_RD=torch.zeros(3, 60_000))
    lies = [
        (sent, "/etc/passwd", "bad_request.*no address of shared memory"),
        (sent, "", "bad_request.*no address of shared memory"),
        (sent, f"shoal-{'0' * 32}/1/2", "unreachable"),
        (wide, small.address, "unreachable"),
        (sent, twice.address, "bad_request.*neither 0 nor 1"),
    ]
    peer = doors.peers.peer(host)
    for asked, address, said in lies:
        with pytest.raises(HostRefused, match=said):
            peer._send(partial(encode_shared, asked, address)).result(10)
    assert len(train(rig, 1)) == 1


def test_a_step_that_is_lost_leaves_no_block_behind(
    checkpoint: Callable[[str], Path], doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.training.grpc_peer.LEAST_BYTES", 1)
    rig = make_rig(checkpoint("mini"), 2, doors=doors)
    released: list[SharedCall] = []
    release = SharedCall.release
    monkeypatch.setattr(SharedCall, "release", lambda call: (released.append(call), release(call)))

    def lose(this: SharedCall, timeout_s: float) -> BackwardReply:
        raise HostUnavailable("gone")

    monkeypatch.setattr(SharedCall, "result", lose)
    with pytest.raises(StepLost):
        train(rig, 1)
    assert len(released) == 2
    assert all(call._block is None for call in released)


def test_a_block_whose_answer_may_still_come_is_not_used_again() -> None:
    blocks = Blocks()
    block = blocks.take(1)
    future: Future[BackwardReply | SharedAnswer] = Future()
    call = SharedCall(StreamCall(future, Host("a", 1, "")), Layout(3, 8, 5), block, blocks, pytest.fail)
    with pytest.raises(HostSlow):
        call.result(0)
    call.release()
    assert blocks.take(1) is not block


def test_every_damaged_byte_of_a_state_is_found() -> None:
    state = {"down_proj": torch.randn(3, 4), "down_proj.mean": torch.zeros(3, 4)}
    message = encode_state((2, 5), 9, state)
    pair, version, got = decode_state(message)
    assert (pair, version) == ((2, 5), 9)
    assert all(torch.equal(got[name], state[name]) for name in state)
    for place in range(0, len(message), 7):
        damaged = bytearray(message)
        damaged[place] ^= 1
        with pytest.raises(TransferFailed):
            decode_state(bytes(damaged))
    with pytest.raises(TransferFailed, match="too few"):
        decode_state(message[:10])
