"""Single calls to training hosts by gRPC, each done and told as a host of the same process would."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.errors import CallRefused, FrameError, HostRefused, HostUnavailable, TransferFailed
from experts.training.frames import (
    decode_answer,
    decode_header,
    decode_request,
    encode_refusal,
    encode_reply,
    encode_request,
    encode_shared,
)
from experts.training.messages import BackwardReply
from experts.training.spec import ExpertTraining, LowRank
from experts.training.states import decode_state, encode_state
from model.checkpoint import Checkpoint
from router.holding import Pair
from router.placement import Host
from tests.training.rig import Doors, Rig, make_host, make_rig
from tests.training.test_grpc import request
from tests.training.test_steps import same, train, weights

LORA = ExpertTraining("run", lora=LowRank(3, 6.0))


@pytest.fixture
def doors(checkpoint: Callable[[str], Path]) -> Iterator[Doors]:
    made = Doors(Checkpoint.open(checkpoint("mini")))
    yield made
    made.close()


def test_factors_are_trained_and_handed_on_as_in_one_process(checkpoint: Callable[[str], Path], doors: Doors) -> None:
    """Also to a host that joins, whose own first factors are the same and whose moments are not."""
    near = make_rig(checkpoint("mini"), 2, training=LORA, clip=1.0)
    far = make_rig(checkpoint("mini"), 2, training=LORA, clip=1.0, doors=doors)

    def move(step: int) -> None:
        if step != 2:
            return
        table = far.table.placement
        life = Host("host-2", 1, "local")
        far.expert_hosts["host-2"], far.hosts["host-2"] = make_host(far.checkpoint, life, table.held_by("host-1"))
        life = doors.open(life, far.expert_hosts["host-2"], far.hosts["host-2"])
        far.table.placement = replace(table, epoch=table.epoch + 1, hosts=(table.hosts[0], life))

    assert train(far, 4, move) == train(near, 4)
    del far.hosts["host-1"]
    assert same(weights(far), weights(near))


def test_a_restart_gives_the_checkpoints_weights_back(checkpoint: Callable[[str], Path], doors: Doors) -> None:
    rig = make_rig(checkpoint("mini"), 2, doors=doors)
    coordinator = rig.workers[0]._coordinator
    assert coordinator is not None
    coordinator.restart(rig.table.placement)
    first = {name: tensor.clone() for name, tensor in weights(rig).items() if name[0].isdigit()}
    train(rig, 2)
    assert not any(torch.equal(weights(rig)[name], tensor) for name, tensor in first.items())
    coordinator.restart(rig.table.placement)
    assert all(torch.equal(weights(rig)[name], tensor) for name, tensor in first.items())
    assert {version for host in rig.hosts.values() for version in host.status().versions.values()} == {0}


def started(rig: Rig) -> Host:
    """The first host of a rig, whose run was begun."""
    coordinator = rig.workers[0]._coordinator
    assert coordinator is not None
    coordinator.restart(rig.table.placement)
    return rig.table.placement.hosts[0]


def test_what_no_host_could_do_is_told_apart_from_what_this_one_cannot(
    checkpoint: Callable[[str], Path], doors: Doors, tmp_path: Path
) -> None:
    rig = make_rig(checkpoint("mini"), 2, doors=doors)
    host = started(rig)
    peer, (pair, *_) = doors.peers.peer(host), rig.table.placement.held_by(host.id)
    with pytest.raises(CallRefused, match="host-0"):
        peer.load(tmp_path / "nothing", [pair])
    with pytest.raises(HostRefused, match=r"^not_ready: .* is at step 0; 5 is to be saved"):
        peer.save(tmp_path, [pair], 5)
    with pytest.raises(HostRefused, match=r"^not_held: "):
        list(peer.states([(77, 0)]))


def test_no_call_is_answered_by_another_life(checkpoint: Callable[[str], Path], doors: Doors, tmp_path: Path) -> None:
    rig = make_rig(checkpoint("mini"), 1, doors=doors)
    host = started(rig)
    before = {name: tensor.clone() for name, tensor in weights(rig).items()}
    peer = doors.peers.peer(replace(host, generation=5))
    pairs = rig.table.placement.held_by(host.id)
    for call in (
        lambda: peer.configure(ExpertTraining("another")),
        lambda: peer.status(),
        lambda: peer.begin(0, 1, 1, pairs),
        lambda: peer.squared_norms(0),
        lambda: peer.apply(0, 1e-3, 1.0),
        lambda: peer.pull(pairs, host),
        lambda: peer.restart(pairs),
        lambda: peer.save(tmp_path, pairs, 0),
        lambda: peer.load(tmp_path, pairs),
        lambda: list(peer.states(pairs)),
    ):
        with pytest.raises(HostRefused, match="host-0 is in generation 1; the call was for 5") as refused:
            call()
        assert refused.value.code == "wrong_generation"
    assert rig.hosts["host-0"].status().run_id == "run"
    assert same(weights(rig), before)
    assert list(tmp_path.iterdir()) == []


def test_an_expert_that_was_not_asked_for_is_not_taken(
    checkpoint: Callable[[str], Path], doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(checkpoint("mini"), 2, 2, doors=doors)
    source, taker = rig.table.placement.hosts
    started(rig)
    before = {name: tensor.clone() for name, tensor in weights(rig).items()}

    def others(host: Host, pairs: Sequence[Pair]) -> Iterator[bytes]:
        version, state = rig.hosts[host.id].state((1, 0))
        yield from (encode_state((1, 0), version, {name: one + 1 for name, one in state.items()}) for _ in pairs)

    door = doors._servers[1]._training
    assert door is not None
    monkeypatch.setattr(door, "_fetch", others)
    with pytest.raises(HostUnavailable, match=r"expert \(1, 0\) came where \(1, 1\) was asked for"):
        doors.peers.peer(taker).pull([(1, 1)], source)
    assert same(weights(rig), before)


@pytest.mark.parametrize("lie", ["generation", "rows", "width"])
def test_gradients_of_another_life_or_shape_are_not_used(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    """Whoever sends them takes no part any more, and is not asked again in this step."""
    expected = make_rig(checkpoint("mini"), 2, 2, clip=1.0)
    rig = make_rig(checkpoint("mini"), 2, 2, clip=1.0)
    liar = rig.hosts["host-1"]
    backward, asked = liar.backward, 0

    def changed(*given: object) -> BackwardReply:
        nonlocal asked
        asked += 1
        reply = backward(*given)  # type: ignore[arg-type]
        if lie == "generation":
            return BackwardReply(reply.generation - 1, reply.dx_AD * 2, reply.dweight_A)
        dx_AD = torch.cat((reply.dx_AD, reply.dx_AD[:1])) if lie == "rows" else reply.dx_AD[:, :-1]
        return BackwardReply(reply.generation, dx_AD, reply.dweight_A)

    liar.backward = changed  # type: ignore[method-assign, assignment]
    assert train(rig, 1) == train(expected, 1)
    assert rig.lost == ["host-1"]
    assert asked == 1


def test_a_frame_of_another_kind_is_not_taken_for_what_was_wanted() -> None:
    reply = encode_reply(BackwardReply(7, torch.zeros(2, 8), torch.zeros(2)), 5)
    for frame in (reply, encode_refusal(HostRefused("failed", "no memory"), 5), encode_shared(request(), "shoal", 5)):
        with pytest.raises(FrameError, match="expected 1, a backward request"):
            decode_request(decode_header(frame), frame)
    for frame in (encode_request(request(), 6), encode_shared(request(), "shoal", 6)):
        correlation, read = decode_answer(frame)
        assert correlation == 6
        with pytest.raises(FrameError, match="expected 2, a reply"):
            read()


@pytest.mark.parametrize("over", [{"rows": 1 << 17}, {"pairs": (1 << 20) + 1}, {"hidden": (1 << 16) + 1}])
def test_a_request_over_the_caps_is_not_sent(over: dict[str, int]) -> None:
    size = {"rows": 0, "pairs": 0, "hidden": 1} | over
    rows_RD = torch.empty(size["rows"], size["hidden"])
    ints_P = torch.zeros(size["pairs"], dtype=torch.int32)
    wide = replace(
        request(),
        x_RD=rows_RD,
        dout_RD=rows_RD,
        pair_row_P=ints_P,
        pair_expert_P=ints_P,
        pair_weight_P=ints_P.float(),
        answer_P=ints_P,
    )
    for encode in (encode_request, lambda one, number: encode_shared(one, "shoal", number)):
        with pytest.raises(FrameError, match="use smaller micro-batches"):
            encode(wide, 1)


def test_an_address_longer_than_any_is_no_frame() -> None:
    assert decode_header(encode_shared(request(), "x" * 256, 1)).payload == 256
    with pytest.raises(FrameError, match="has no room for 257 payload bytes"):
        decode_header(encode_shared(request(), "x" * 257, 1))


def test_a_state_that_is_no_tensors_is_named() -> None:
    whole = encode_state((2, 5), 9, {})
    assert decode_state(whole) == ((2, 5), 9, {})
    head, body = whole[32:48], b"noise"
    with pytest.raises(TransferFailed, match="expert 5 in layer 2 is not safetensors"):
        decode_state(hashlib.sha256(head + body).digest() + head + body)
