"""An application that is deployed again: what begins anew, what is taken on, and who is turned away."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cluster.change import ChangeRefused, Phase, Wish
from cluster.joining import AGAIN_S, FIXED, REST_S, TRIES, Joining, OtherFiles, contents_of
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
    """Takes wishes until it refuses; `end` ends the change that is under way."""

    ever_ready = True

    def __init__(self) -> None:
        self.change: Any = None
        self.refusal: ChangeRefused | None = None
        self.asked: list[Wish] = []
        self.recorded: list[str] = []
        self.events = SimpleNamespace(record=lambda kind, now_s, **fields: self.recorded.append(kind))

    def request(self, wish: Wish, now_s: float) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(wish)
        self.change = SimpleNamespace(phase=Phase.PLAN, reason=None)
        return self.change

    def end(self, phase: Phase) -> None:
        self.change.phase, self.change.reason = phase, "a host died"
        self.change = None


def pursue(joining: Joining, conductor: FakeConductor, now_s: float = 0.0) -> bool:
    return joining.pursue(conductor, now_s)  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("before", "after", "wish"),
    [
        ((2, 1), (4, 2), {"kind": "scale", "hosts": 4, "replicas": 2}),
        ((2, 2), (1, 1), {"kind": "scale", "hosts": 1, "replicas": 1}),  # neither could be had alone
        ((2, 1), (4, 1), {"kind": "scale", "hosts": 4}),
        ((2, 1), (2, 2), {"kind": "replicas", "replicas": 2}),
    ],
)
def test_new_numbers_become_one_wish(before: tuple[int, int], after: tuple[int, int], wish: dict[str, Any]) -> None:
    first = replace(SPEC, hosts=before[0], replicas=before[1])
    joining, conductor = Joining(first, None), FakeConductor()
    again = replace(SPEC, hosts=after[0], replicas=after[1])
    joining.take_on(again)
    assert joining.take_on(again) == {}  # of the next worker
    assert not pursue(joining, conductor)
    assert conductor.asked == [Wish(**wish)]
    assert not pursue(joining, conductor)  # it is under way
    conductor.end(Phase.DONE)
    assert pursue(joining, conductor)
    assert (joining.told["hosts"], joining.told["replicas"]) == after
    assert not pursue(joining, conductor)
    assert (len(conductor.asked), conductor.recorded) == (1, [])


def test_new_numbers_wait_for_another_change() -> None:
    joining, conductor = Joining(SPEC, None), FakeConductor()
    joining.take_on(replace(SPEC, hosts=4))
    conductor.change = object()
    pursue(joining, conductor)
    conductor.change, conductor.refusal = None, ChangeRefused("later", busy=True)
    pursue(joining, conductor)
    assert conductor.asked == []
    conductor.refusal = None
    pursue(joining, conductor)
    assert conductor.asked == [Wish("scale", hosts=4)]


def test_a_change_that_is_rolled_back_is_begun_again_some_times() -> None:
    joining, conductor, now_s = Joining(SPEC, None), FakeConductor(), 0.0
    joining.take_on(replace(SPEC, hosts=4))
    for tried in range(1, TRIES + 1):
        pursue(joining, conductor, now_s)
        assert len(conductor.asked) == tried
        conductor.end(Phase.ROLLED_BACK)
        assert pursue(joining, conductor, now_s) == (tried == TRIES)
        pursue(joining, conductor, now_s)
        assert len(conductor.asked) == tried  # not at once
        now_s += AGAIN_S
    pursue(joining, conductor, now_s)
    assert (len(conductor.asked), conductor.recorded) == (TRIES, ["redeployment_refused"])


def test_what_cannot_be_had_is_told_once() -> None:
    joining, conductor = Joining(SPEC, None), FakeConductor()
    joining.take_on(replace(SPEC, hosts=40))
    conductor.refusal = ChangeRefused("too many")
    assert pursue(joining, conductor)
    assert not pursue(joining, conductor)
    assert conductor.recorded == ["redeployment_refused"]


def test_numbers_that_are_taken_back_while_they_come_about_are_pursued_too() -> None:
    joining, conductor = Joining(SPEC, None), FakeConductor()
    joining.take_on(replace(SPEC, hosts=4))
    pursue(joining, conductor)
    assert joining.take_on(SPEC) == {"hosts": 2}
    conductor.end(Phase.DONE)
    pursue(joining, conductor)
    assert conductor.asked == [Wish("scale", hosts=4), Wish("scale", hosts=2)]


def test_what_was_asked_for_meanwhile_is_not_undone_by_a_worker_that_comes_back() -> None:
    """A worker that Serve replaces brings the description of the last deployment."""
    joining, conductor = Joining(SPEC, None), FakeConductor()
    assert joining.take_on(SPEC) == {}
    assert joining.take_on(replace(SPEC, hosts=4, standby=0)) == {"hosts": 4, "standby": 0}
    pursue(joining, conductor)
    conductor.end(Phase.DONE)
    pursue(joining, conductor)
    next_life = Joining(SPEC, joining.state)  # Ray starts it with the first description
    assert next_life.take_on(replace(SPEC, hosts=4, standby=0)) == {}
    assert not pursue(next_life, conductor)
    assert len(conductor.asked) == 1


def test_the_next_life_goes_on_with_what_is_wanted() -> None:
    joining, conductor = Joining(SPEC, None), FakeConductor()
    joining.take_on(replace(SPEC, hosts=4))
    state = json.loads(json.dumps(joining.state))
    next_life = Joining(SPEC, state)
    assert next_life.take_on(replace(SPEC, hosts=4)) == {}
    pursue(next_life, conductor)
    assert conductor.asked == [Wish("scale", hosts=4)]


def test_hosts_that_follow_nodes_are_not_counted_by_a_deployment() -> None:
    following, conductor = replace(SPEC, node_resource="expert"), FakeConductor()
    joining = Joining(following, None)
    assert joining.take_on(replace(following, hosts=4)) == {"hosts": 4}
    pursue(joining, conductor)
    assert conductor.asked == []


def test_contents_are_those_of_the_files(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    original = checkpoint("tiny")
    found = [contents_of(Checkpoint.open(original))]
    for name in ("", "model.norm.weight", "model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight"):
        copy = tmp_path / (name or "copy")
        shutil.copytree(original, copy)
        file = next(copy.glob("*.safetensors"))
        tensors = load_file(file)
        if name:
            tensors[name] += 1.0
        save_file(tensors, file)
        found.append(contents_of(Checkpoint.open(copy)))
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_contents_are_known_without_torch(checkpoint: Callable[[str], Path]) -> None:
    """The controller and the ingresses have none of it, and are so much smaller."""
    script = (
        "import sys; from cluster.joining import contents_of; from model.checkpoint import Checkpoint; "
        f"contents_of(Checkpoint.open({str(checkpoint('tiny'))!r})); print('torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.strip() == "False", ran.stderr
