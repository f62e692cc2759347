"""TLS between a run's workers and hosts: all calls, with the recipe's files or those of a service that takes it in."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import torch
from rich.console import Console

from cluster import training_hosts
from cluster.expert_life import ExpertLife
from cluster.spec import ServiceSpec
from cluster.training_hosts import TrainingHosts
from experts.errors import HostRefused, HostUnavailable
from experts.lease_transport import LeaseTransport
from experts.messages import ForwardRequest
from experts.tls import TlsFiles
from experts.training.grpc_peer import GrpcPeers
from experts.transport_kinds import TransportKind
from model.checkpoint import Checkpoint
from router.placement import Host
from services.training import driver, ray_loop
from services.training.driver import absolute, first_weights, preview, service_spec, train
from services.training.inputs import share_data
from services.training.outcome import Outcome, read_outcome
from services.training.recipe import Recipe, parse_recipe
from services.training.room import NodeRoom, Room
from services.training.session import ServiceUnusable, check_service
from services.training.trainer import from_plain, plain
from tests.certificates import NAME, make_certificate
from tests.training.small_run import small_run

Make = Callable[..., Recipe]


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return make_certificate(tmp_path)


@pytest.fixture
def make(checkpoint: Callable[[str], Path], tmp_path: Path) -> Make:
    raw = small_run(checkpoint("mini"), tmp_path) | {"workers": {"threads": 1}}

    def recipe(**experts: object) -> Recipe:
        return parse_recipe(raw | {"experts": experts})

    return recipe


def given(files: TlsFiles) -> dict[str, str]:
    """As a recipe has them."""
    paths = {"certificate": files.certificate, "key": files.key, "root": files.root}
    return {name: str(path) for name, path in paths.items()} | {"name": NAME}


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[ServiceSpec]:
    """Hosts of the runs that were begun; no Ray is needed for it."""
    specs: list[ServiceSpec] = []

    @contextlib.contextmanager
    def no_ray(*_: object) -> Iterator[None]:
        yield

    def fit(recipe: Recipe, service: ServiceSpec, most: int, steps: int, console: Console) -> int:
        specs.append(service)
        return steps

    monkeypatch.setattr(driver, "ray_of_run", no_ray)
    monkeypatch.setattr(driver, "look", lambda _: Room((NodeRoom({"CPU": 9}, {"CPU": 9}),)))
    monkeypatch.setattr(driver, "fit", fit)
    return specs


def test_a_runs_hosts_have_the_recipes_files(make: Make, files: TlsFiles, begun: list[ServiceSpec]) -> None:
    for recipe in (make(), make(tls=given(files))):
        train(recipe, Console(file=io.StringIO()))
    without, guarded = begun
    assert (without.tls, guarded.tls) == (None, files)
    assert without.name != guarded.name  # hosts without are not taken for these
    for spec in begun:  # as its workers are told
        assert from_plain(json.loads(json.dumps(plain(spec)))) == replace(spec, adapters=[])  # type: ignore[arg-type]


def test_guests_have_those_of_their_service(
    make: Make, files: TlsFiles, begun: list[ServiceSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "check_service", lambda service, hosts: files)
    train(make(service="p8000"), Console(file=io.StringIO()))
    (spec,) = begun
    assert (spec.lodges_with, spec.tls) == ("p8000", files)


@pytest.mark.parametrize("part", ["certificate", "key", "root"])
def test_a_file_that_is_not_there_is_named_before_anything_is_started(
    make: Make, files: TlsFiles, begun: list[ServiceSpec], tmp_path: Path, part: str
) -> None:
    with pytest.raises(ValueError, match=r"^TLS file .*/nowhere: No such file .*; give a readable PEM file$"):
        train(make(tls=given(files) | {part: str(tmp_path / "nowhere")}), Console(file=io.StringIO()))
    assert begun == []
    assert not (tmp_path / "out").exists()


def test_links_are_kept_and_a_tilde_is_home(
    make: Make, files: TlsFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret's files are links into a directory that Kubernetes names anew with each change, and in each pod."""
    (tmp_path / "..data").symlink_to(tmp_path)
    (tmp_path / "tls.key").symlink_to(Path("..data") / files.key.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    placed = absolute(make(tls=given(files) | {"key": "tls.key", "root": "~/ca.crt"})).experts.tls
    assert placed is not None
    expected = (files.certificate, tmp_path / "tls.key", tmp_path / "home" / "ca.crt", NAME)
    assert (placed.certificate, placed.key, placed.root, placed.name) == expected


def service_with(tls: TlsFiles | None) -> Any:
    """The controller of a ready service."""
    status = {"state": "ready", "reason": None, "expert_hosts": [{"id": "host-0", "state": "ready"}]}
    return SimpleNamespace(status=SimpleNamespace(remote=lambda: status), tls=SimpleNamespace(remote=lambda: tls))


def test_a_service_tells_its_files_which_must_be_here(
    files: TlsFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    for tls in (None, files):
        monkeypatch.setattr(ray, "get_actor", lambda name, namespace, tls=tls: service_with(tls))
        assert check_service("p8000", 1) == tls
    files.key.unlink()
    with pytest.raises(
        ServiceUnusable, match=f"the service p8000 is guarded by TLS, .*here: TLS file {files.key}: No such file"
    ):
        check_service("p8000", 1)


def test_a_worker_whose_node_lacks_a_file_ends_the_run_with_a_message(
    make: Make, files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tls=given(files))
    _, data, steps = preview(recipe)
    recipe.output_dir.mkdir()
    share_data(recipe.output_dir, data)
    service = plain(service_spec(recipe, first_weights(recipe)))
    files.root.unlink()
    monkeypatch.setattr(ray_loop.ray.train, "get_context", lambda: SimpleNamespace(get_world_size=lambda: 1))
    ray_loop.train_worker({"recipe": recipe.model_dump(mode="json"), "service": service, "steps": steps})
    said = f"TLS file {files.root}: No such file or directory; give a readable PEM file"
    assert read_outcome(recipe.output_dir) == Outcome(failed=said)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's hold on hosts, without Ray and a controller."""
    monkeypatch.setattr(training_hosts, "join_service", lambda spec, contents: (MagicMock(), "the-token"))
    monkeypatch.setattr(training_hosts, "PlacementFollower", MagicMock())
    monkeypatch.setattr(training_hosts, "find_controller", MagicMock())
    monkeypatch.setattr(ray, "get", MagicMock())
    monkeypatch.setattr(TrainingHosts, "_beat", lambda self: None)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("transport", ["grpc", "auto"])
def test_every_call_of_a_run_is_guarded(
    checkpoint: Callable[[str], Path], files: TlsFiles, transport: TransportKind
) -> None:
    """The hosts refuse what they are asked, as there is no step to make, but only of whom they hear."""
    opened = Checkpoint.open(checkpoint("mini"))
    spec = ServiceSpec("run", str(opened.directory), trains=True, transport=transport, tls=files)
    layer = opened.config.moe_layers[0]
    nothing = torch.zeros(1, dtype=torch.int32)
    request = ForwardRequest(1, 1, layer, torch.zeros(1, opened.config.hidden_size), nothing, nothing)
    with contextlib.ExitStack() as stack:
        lives = [ExpertLife(spec, f"expert:{number}", "the-token", 1) for number in range(2)]
        for number, life in enumerate(lives):
            stack.callback(life.end)
            life.begin(f"host-{number}", 1, {(layer, 0)}, 1, None, "127.0.0.1:0")
        friend, plain_one = TrainingHosts(spec, opened, 0, 64), TrainingHosts(replace(spec, tls=None), opened, 0, 64)
        for each in (friend, plain_one):
            stack.callback(each.close)
        host = Host("host-0", 1, lives[0].report().address)

        assert friend.peers.peer(host).status().run_id is None
        with pytest.raises(HostUnavailable):
            plain_one.peers.peer(host).status()
        with pytest.raises(HostRefused, match=r"^not_ready: host-0"):
            friend._transport.submit(host, request).result(10)
        with pytest.raises(HostUnavailable):
            plain_one._transport.submit(host, request).result(10)
        for hosts, paired in ((friend, True), (plain_one, False)):
            if isinstance(hosts._transport, LeaseTransport):
                assert hosts._transport.wait_ready(host, 10 if paired else 0.5) is paired
        server = lives[1]._server
        assert server is not None
        assert server._training is not None
        with pytest.raises(HostRefused, match=r"^not_held: host-0"):
            list(server._training._fetch(host, [(layer, 0)]))
        with pytest.raises(HostUnavailable):
            list(GrpcPeers("the-token").fetch(host, [(layer, 0)]))
