"""An application that is deployed again: what begins anew, what is taken on, and who is turned away."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cluster.change import ChangeRefused, Wish
from cluster.joining import FIXED, REST_S, Joining, OtherFiles, contents_of
from cluster.spec import ServiceSpec
from experts.tls import TlsFiles
from model.checkpoint import Checkpoint

SPEC = ServiceSpec("shoal", "/models/one", hosts=2)
OTHERS: dict[str, Any] = {
    "model": "/models/two",
    "adapters": ("/adapters/one",),
    "transport": "grpc",
    "tls": TlsFiles(Path("a"), Path("b"), Path("c")),
    "node_resource": "expert",
    "gpus": 1.0,
    "follow_application": False,
    "trains": True,
    "idle_end_s": 5.0,
    "lodges_with": "p8000",
}


class FakeConductor:
    """Takes wishes until it refuses."""

    ever_ready = True

    def __init__(self) -> None:
        self.change: object = None
        self.refusal: ChangeRefused | None = None
        self.asked: list[Wish] = []
        self.recorded: list[str] = []
        self.events = SimpleNamespace(record=lambda kind, now_s, **fields: self.recorded.append(kind))

    def request(self, wish: Wish, now_s: float) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(wish)


def test_every_fixed_field_is_tried() -> None:
    assert set(OTHERS) == set(FIXED)


@pytest.mark.parametrize("name", FIXED)
def test_another_model_or_way_begins_anew(name: str) -> None:
    assert not Joining(SPEC, None).belongs(replace(SPEC, **{name: OTHERS[name]}), 0.0)


def test_the_same_description_belongs_however_it_was_sent() -> None:
    spec = replace(SPEC, adapters=("/adapters/one",))
    assert Joining(spec, None).belongs(replace(spec, adapters=["/adapters/one"]), 0.0)
    assert Joining(spec, None).belongs(replace(spec, hosts=5, replicas=2, threads=1, auto_rebalance=True), 0.0)


def test_a_failed_start_is_told_for_a_while_and_then_tried_again() -> None:
    joining = Joining(SPEC, None)
    joining.failed(100.0)
    assert joining.belongs(SPEC, 100.0 + REST_S)
    assert not joining.belongs(SPEC, 100.1 + REST_S)


def test_who_reads_other_files_is_turned_away() -> None:
    joining = Joining(SPEC, None)
    joining.check("whatever")  # nothing is known yet
    joining.opened("these")
    joining.check("these")
    with pytest.raises(OtherFiles, match="/models/one is not here what this service began with"):
        joining.check("those")


def test_new_numbers_become_wishes_one_after_another() -> None:
    joining, conductor = Joining(SPEC, None), FakeConductor()
    assert joining.take_on(replace(SPEC, hosts=4, replicas=2)) == {"hosts": 4, "replicas": 2}
    joining.pursue(conductor, 0.0)  # type: ignore[arg-type]
    conductor.change = object()
    joining.pursue(conductor, 0.0)  # type: ignore[arg-type]
    assert conductor.asked == [Wish("scale", hosts=4)]
    conductor.change, conductor.refusal = None, ChangeRefused("later", busy=True)
    joining.pursue(conductor, 0.0)  # type: ignore[arg-type]
    conductor.refusal = None
    joining.pursue(conductor, 0.0)  # type: ignore[arg-type]
    joining.pursue(conductor, 0.0)  # type: ignore[arg-type]
    assert conductor.asked == [Wish("scale", hosts=4), Wish("replicas", replicas=2)]


def test_what_cannot_be_had_is_told_once() -> None:
    joining, conductor = Joining(SPEC, None), FakeConductor()
    joining.take_on(replace(SPEC, hosts=40))
    conductor.refusal = ChangeRefused("too many")
    joining.pursue(conductor, 0.0)  # type: ignore[arg-type]
    joining.pursue(conductor, 0.0)  # type: ignore[arg-type]
    assert conductor.recorded == ["redeployment_refused"]


def test_what_was_asked_for_meanwhile_is_not_undone_by_a_worker_that_comes_back() -> None:
    """A worker that Serve replaces brings the description of the last deployment."""
    joining = Joining(SPEC, None)
    assert joining.take_on(SPEC) == {}
    assert joining.take_on(replace(SPEC, hosts=4)) == {"hosts": 4}
    assert joining.take_on(replace(SPEC, hosts=4)) == {}
    next_life = Joining(SPEC, joining.told)  # Ray starts it with the first description
    assert next_life.take_on(replace(SPEC, hosts=4)) == {}


def test_hosts_that_follow_nodes_are_not_counted_by_a_deployment() -> None:
    following, conductor = replace(SPEC, node_resource="expert"), FakeConductor()
    joining = Joining(following, None)
    assert joining.take_on(replace(following, hosts=4)) == {"hosts": 4}
    joining.pursue(conductor, 0.0)  # type: ignore[arg-type]
    assert conductor.asked == []


def test_contents_are_those_of_the_files(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    original = checkpoint("tiny")
    copy, other, adapter = tmp_path / "copy", tmp_path / "other", tmp_path / "adapter"
    shutil.copytree(original, copy)
    shutil.copytree(original, other)
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"1234")
    file = next(other.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, file)
    found = [contents_of(Checkpoint.open(path), ()) for path in (original, copy, other)]
    assert found[0] == found[1] != found[2]
    with_adapter = contents_of(Checkpoint.open(original), (str(adapter),))
    (adapter / "adapter_model.safetensors").write_bytes(b"12345")
    assert len({found[0], with_adapter, contents_of(Checkpoint.open(original), (str(adapter),))}) == 3
