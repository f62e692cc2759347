"""A living host takes on experts: the same bits from a host as from disk, and all of them or none."""

import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.grpc_server import ExpertServer
from experts.held import MakeStore
from experts.host import ExpertHost
from experts.loader import LoadAbandoned, Loader, WeightsDamaged
from experts.messages import ForwardRequest
from experts.training.store import TrainableExperts
from experts.transfer import encode_expert
from kernels.experts import PackedExperts
from model.checkpoint import Checkpoint, CheckpointError, ExpertWeights
from model.tensors import expert_names
from router.holding import Pair
from router.placement import Host
from tests.certificates import make_certificate
from tests.model.files import edit_tensors

TOKEN = "the-token-of-this-service"
ALL = [(layer, expert) for layer in (1, 2) for expert in range(16)]


def never() -> bool:
    return False


def ignore(held: int) -> None:
    pass


def request(layer: int, expert: int) -> ForwardRequest:
    x_RD = torch.randn(3, 256, generator=torch.Generator().manual_seed(expert))
    return ForwardRequest(1, 1, layer, x_RD, torch.arange(3).int(), torch.full((3,), expert).int())


def answer(host: ExpertHost, pair: Pair) -> Tensor:
    return host.forward(request(*pair)).y_PD


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("tiny"))


@pytest.fixture(scope="module")
def full(opened: Checkpoint) -> ExpertHost:
    """The source: it holds everything, read from disk."""
    made = ExpertHost(opened.config, "host-0", 1)
    made.load(opened, ALL)
    return made


@pytest.fixture
def server(full: ExpertHost) -> Iterator[ExpertServer]:
    made = ExpertServer(full, token=TOKEN)
    made.start()
    yield made
    made.stop(0)


@pytest.fixture
def host(opened: Checkpoint) -> ExpertHost:
    return ExpertHost(opened.config, "host-1", 1)


def everything_from(server: ExpertServer) -> dict[Pair, Host]:
    return dict.fromkeys(ALL, Host("host-0", 1, server.address))


def test_experts_of_a_host_compute_as_those_of_the_disk(
    opened: Checkpoint, full: ExpertHost, server: ExpertServer, host: ExpertHost
) -> None:
    heard: list[int] = []
    report = Loader(host, opened, TOKEN).load(ALL, everything_from(server), never, heard.append)
    assert (report.from_hosts, report.from_disk, report.reasons) == (len(ALL), 0, ())
    assert host.held == full.held
    assert host.stats().nbytes == full.stats().nbytes
    assert heard == [*range(len(ALL) + 1), len(ALL)]
    for pair in ALL:
        assert torch.equal(answer(host, pair), answer(full, pair))


def test_a_bfloat16_checkpoint_is_the_same_from_host_and_disk(opened: Checkpoint, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(opened.directory, tmp_path / "bf16"))
    edit_tensors(directory, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    half = Checkpoint.open(directory)
    assert half.expert(1, 0).gate_proj.dtype == torch.bfloat16
    source, taker, reader = (ExpertHost(half.config, "host-0", 1) for _ in range(3))
    source.load(half, ALL)
    server = ExpertServer(source, token=TOKEN)
    server.start()
    assert Loader(taker, half, TOKEN).load(ALL, everything_from(server), never, ignore).from_hosts == len(ALL)
    assert Loader(reader, half).load(ALL, {}, never, ignore).from_disk == len(ALL)
    for pair in ALL:
        for name in ("gate_proj", "up_proj", "down_proj"):
            taken = getattr(taker.weights(*pair), name)
            assert taken.dtype == torch.bfloat16
            assert torch.equal(taken, getattr(half.expert(*pair), name))
        assert torch.equal(answer(taker, pair), answer(reader, pair))
    server.stop(0)


@pytest.mark.parametrize("narrow", [(), ("gate_proj", "up_proj", "down_proj"), ("down_proj",)])
@pytest.mark.parametrize("make_store", [PackedExperts, TrainableExperts])
def test_hosts_that_serve_or_train_take_from_their_like_whatever_the_dtypes(
    opened: Checkpoint, tmp_path: Path, narrow: tuple[str, ...], make_store: MakeStore
) -> None:
    """Of layer 1, some matrices of every expert are in bfloat16."""
    directory = Path(shutil.copytree(opened.directory, tmp_path / "mixed"))
    chosen = {name for pair in ALL if pair[0] == 1 for name in expert_names(*pair) if name.split(".")[-2] in narrow}
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].bfloat16() for name in chosen}))
    mixed = Checkpoint.open(directory)
    source, taker = (ExpertHost(mixed.config, "host-0", 1, make_store=make_store) for _ in range(2))
    source.load(mixed, ALL)
    server = ExpertServer(source, token=TOKEN)
    server.start()
    report = Loader(taker, mixed, TOKEN).load(ALL, everything_from(server), never, ignore)
    server.stop(0)
    assert (report.from_hosts, report.reasons) == (len(ALL), ())
    assert all(torch.equal(answer(taker, pair), answer(source, pair)) for pair in ALL)


def test_what_has_no_source_comes_from_disk_and_what_is_held_stays(
    opened: Checkpoint, server: ExpertServer, host: ExpertHost
) -> None:
    host.load(opened, [(1, 0), (2, 9)])
    kept = host._layers[1]._experts[0]
    sources = {(1, 0): Host("host-0", 1, server.address), (1, 1): Host("host-0", 1, server.address)}
    heard: list[int] = []
    report = Loader(host, opened, TOKEN).load([(1, 1), (1, 0), (2, 3)], sources, never, heard.append)
    assert (report.from_hosts, report.from_disk) == (1, 1)
    assert host.held == ((1, 0), (1, 1), (2, 3), (2, 9))
    assert host._layers[1]._experts[0] is kept
    assert (heard[0], heard[-1]) == (1, 3)


def test_a_source_that_stops_midway_costs_only_reading(
    opened: Checkpoint,
    full: ExpertHost,
    server: ExpertServer,
    host: ExpertHost,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stoppers: list[threading.Thread] = []
    stopped = threading.Event()

    def stop() -> None:
        server._server.stop(0).wait(10)
        stopped.set()

    def encode(pair: Pair, weights: ExpertWeights) -> bytes:
        if pair == (1, 5):
            stoppers.append(threading.Thread(target=stop))
            stoppers[0].start()
            stopped.wait(1)
        return encode_expert(pair, weights)

    monkeypatch.setattr("experts.grpc_server.encode_expert", encode)
    report = Loader(host, opened, TOKEN).load(ALL, everything_from(server), never, ignore)
    assert report.from_disk >= len(ALL) - 5
    assert report.from_hosts + report.from_disk == len(ALL)
    assert len(report.reasons) == 1
    assert f"host-1 reads {report.from_disk} experts from disk: host-0 at {server.address}" in caplog.text
    for pair in ALL:
        assert torch.equal(answer(host, pair), answer(full, pair))
    stoppers[0].join()


def test_damaged_bytes_are_not_taken(
    opened: Checkpoint, full: ExpertHost, server: ExpertServer, host: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(pair: Pair, weights: ExpertWeights) -> bytes:
        message = bytearray(encode_expert(pair, weights))
        if pair == (1, 2):
            message[-1] ^= 1
        return bytes(message)

    monkeypatch.setattr("experts.grpc_server.encode_expert", encode)
    report = Loader(host, opened, TOKEN).load(ALL, everything_from(server), never, ignore)
    assert (report.from_hosts, report.from_disk) == (2, len(ALL) - 2)
    assert "digest does not fit expert 2 of layer 1" in report.reasons[0]
    assert all(torch.equal(answer(host, pair), answer(full, pair)) for pair in ALL)


def test_one_sources_failure_is_not_anothers(opened: Checkpoint, server: ExpertServer, host: ExpertHost) -> None:
    sources = everything_from(server) | dict.fromkeys(ALL[:4], Host("host-9", 1, "127.0.0.1:1"))
    report = Loader(host, opened, TOKEN).load(ALL, sources, never, ignore)
    assert (report.from_hosts, report.from_disk) == (len(ALL) - 4, 4)
    assert "host-9" in report.reasons[0]


def test_a_source_wants_the_token_and_the_certificate(
    opened: Checkpoint, full: ExpertHost, host: ExpertHost, tmp_path: Path
) -> None:
    files = make_certificate(tmp_path)
    server = ExpertServer(full, token=TOKEN, tls=files)
    server.start()
    for number, (token, tls) in enumerate([(None, files), (TOKEN, None)]):
        report = Loader(host, opened, token, tls).load(ALL[number : number + 1], everything_from(server), never, ignore)
        assert (report.from_hosts, report.from_disk) == (0, 1)
    assert Loader(host, opened, TOKEN, files).load(ALL, everything_from(server), never, ignore).from_hosts == 30
    server.stop(0)


@pytest.mark.parametrize("by", ["host", "disk"])
@pytest.mark.parametrize("after", [0, 1, 7, len(ALL) - 2])
def test_an_abandoned_load_leaves_what_was_there(
    opened: Checkpoint, full: ExpertHost, server: ExpertServer, host: ExpertHost, by: str, after: int
) -> None:
    host.load(opened, [(1, 3), (2, 4)])
    before = host.stats()
    count = 0
    seen: list[weakref.ref[object]] = []

    def abandoned() -> bool:
        nonlocal count
        count += 1
        seen.extend(weakref.ref(held) for layer in host._layers.values() for held in layer._experts.values())
        return count > after

    sources = everything_from(server) if by == "host" else {}
    with pytest.raises(LoadAbandoned, match=f"host-1 gave up a load after {after} experts"):
        Loader(host, opened, TOKEN).load(ALL, sources, abandoned, ignore)
    assert host.held == ((1, 3), (2, 4))
    assert host.stats() == before
    assert len({id(held()) for held in seen if held() is not None}) == 2  # the memory of all others is free
    assert torch.equal(answer(host, (1, 3)), answer(full, (1, 3)))


def test_a_load_that_is_abandoned_when_all_is_there_is_undone(opened: Checkpoint, host: ExpertHost) -> None:
    with pytest.raises(LoadAbandoned):
        Loader(host, opened).load([(1, 3)], {}, lambda: host.held != (), ignore)
    assert host.held == ()


def test_a_fault_in_the_hosts_memory_is_found(
    opened: Checkpoint, server: ExpertServer, host: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PackedExperts.load

    def faulty(self: PackedExperts, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        if expert == 6:
            down = down.clone()
            down.view(torch.int32)[-1, -1] ^= 1
        real(self, expert, gate, up, down)

    monkeypatch.setattr(PackedExperts, "load", faulty)
    for sources in ({}, everything_from(server)):
        with pytest.raises(WeightsDamaged, match="host-1 does not hold the bits of expert 6 of layer 1"):
            Loader(host, opened, TOKEN).load(ALL, sources, never, ignore)
        assert host.held == ()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_changed_is_refused_by_name(
    opened: Checkpoint, server: ExpertServer, tmp_path: Path, name: str
) -> None:
    directory = Path(shutil.copytree(opened.directory, tmp_path / "copy"))
    copy = Checkpoint.open(directory)
    host = ExpertHost(copy.config, "host-1", 1)
    loader = Loader(host, copy, TOKEN, stamps=copy.stamps())
    loader.load([(1, 0)], {}, never, ignore)
    os.utime(directory / name, ns=(1, 1))
    with pytest.raises(CheckpointError, match=rf"{name} changed since this service started: restart"):
        loader.load([(1, 1), (1, 2)], {(1, 1): Host("host-0", 1, server.address)}, never, ignore)
    assert host.held == ((1, 0),)
    assert loader.load([(1, 1)], everything_from(server), never, ignore).from_hosts == 1  # needs no disk


def test_a_file_that_is_gone_is_named_and_costs_nothing(opened: Checkpoint, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(opened.directory, tmp_path / "copy"))
    copy = Checkpoint.open(directory)
    host = ExpertHost(copy.config, "host-1", 1)
    loader = Loader(host, copy, stamps=copy.stamps())
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read any more"):
        loader.load([(1, 0)], {}, never, ignore)
    assert host.held == ()


def test_a_file_that_changes_while_it_is_read_is_refused(opened: Checkpoint, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(opened.directory, tmp_path / "copy"))
    copy = Checkpoint.open(directory)
    host = ExpertHost(copy.config, "host-1", 1)

    def touch(held: int) -> None:
        if held == 2:
            os.utime(directory / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed since"):
        Loader(host, copy, stamps=copy.stamps()).load([(1, 0), (1, 1)], {}, never, touch)
    assert host.held == ()


def test_requests_go_on_unharmed_while_experts_come_and_go(
    opened: Checkpoint, full: ExpertHost, server: ExpertServer, host: ExpertHost
) -> None:
    kept = [(1, 3), (2, 4)]
    host.load(opened, kept)
    expected = {pair: answer(full, pair) for pair in kept}
    over = threading.Event()
    wrong: list[str] = []
    asked = [0]

    def ask() -> None:
        while not over.is_set():
            for pair in kept:
                try:
                    if not torch.equal(answer(host, pair), expected[pair]):
                        wrong.append(f"{pair}: other bits")
                except Exception as error:  # noqa: BLE001 (whatever it is, no request should meet it)
                    wrong.append(repr(error))
            host.stats()
            asked[0] += 1

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    loader = Loader(host, opened, TOKEN)
    for sources in (everything_from(server), {}, everything_from(server)):
        loader.load(ALL, sources, never, ignore)
        host.unload(set(ALL) - set(kept))
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert asked[0] > 0
    assert host.held == tuple(kept)


def test_two_loads_of_one_host_take_turns(opened: Checkpoint, host: ExpertHost) -> None:
    """The second must not count on what the first is about to unload."""
    loader = Loader(host, opened)
    begun, give_up = threading.Event(), threading.Event()
    errors: list[str] = []

    def first() -> None:
        def abandoned() -> bool:
            if host.held:
                begun.set()
                assert give_up.wait(20)
                return True
            return False

        try:
            loader.load(ALL, {}, abandoned, ignore)
        except LoadAbandoned as error:
            errors.append(str(error))

    def second() -> None:
        loader.load(ALL[:4], {}, never, ignore)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    threads[1].join(0.05)
    give_up.set()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert host.held == tuple(ALL[:4])


def test_a_receiver_of_other_dtype_or_shape_reads_the_disk(
    opened: Checkpoint, server: ExpertServer, host: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(pair: Pair, weights: ExpertWeights) -> bytes:
        return encode_expert(pair, ExpertWeights(weights.gate_proj.half(), weights.up_proj, weights.down_proj))

    monkeypatch.setattr("experts.grpc_server.encode_expert", encode)
    report = Loader(host, opened, TOKEN).load([(1, 1)], everything_from(server), never, ignore)
    assert report.from_disk == 1
    assert "F16" in report.reasons[0]
