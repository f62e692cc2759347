"""A change that a new controller does not know: what holds is looked up, and nothing else is claimed."""

import json
from typing import Any

import pytest

from services.forgotten_change import judge
from tests.services.script import change_document, service_report
from tests.services.test_experts_command import AWAY, DONE, Door, door, fails, run

__all__ = ["door"]

LOST = "change-3 (scale) is not known any more, as after a restart of the controller"
AFTER = ["host-1", "host-2"]  # members, once host-2 has joined and host-0 has left
STARTING = {"state": "starting", "epoch": 0, "replicas": None, "members": []}
WAITING = "the service is starting, and does not tell yet which hosts it has"


def test_what_was_committed_unseen_is_done(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    """The controller died between the commit and the watcher's next question."""
    door.script.story, door.script.report = [DONE[1], None], service_report(members=AFTER)
    assert run(door, "scale", 2, "--wait") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{LOST}; what it asked for holds: host-2 has joined, host-0 has left"
    door.script.story = [DONE[1], None]
    assert run(door, "scale", 2, "--wait", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == DONE[1]
    assert shown.err.startswith(LOST)


def test_what_was_not_committed_is_not_done(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.story, door.script.report = [DONE[1], None], service_report()
    said = fails(capsys, door, "scale", 2, "--wait")
    lacks = "host-2 has not joined, host-0 has not left"
    assert said == f"shoal: {LOST}, and what it asked for does not hold: {lacks}; ask again"


def test_what_was_seen_committed_is_done(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.story, door.script.report = [DONE[0], DONE[3], None], service_report(epoch=9)
    assert run(door, "scale", 2, "--wait") == 0
    assert f"{LOST}; it was committed at epoch 8" in capsys.readouterr().out
    door.script.story, door.script.report = [DONE[0], DONE[3], None], service_report(epoch=2)
    assert "the service is at epoch 2, for it was started anew" in fails(capsys, door, "scale", 2, "--wait")


def test_a_new_controller_has_time_to_find_its_hosts(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that knows the hosts has no table of them yet."""
    table_lacks = {"epoch": 0, "members": AFTER}
    turns: list[Any] = [AWAY, service_report(**STARTING), service_report(**table_lacks), service_report(members=AFTER)]

    async def status() -> dict[str, Any]:
        told = turns.pop(0)
        if isinstance(told, Exception):
            raise told
        report: dict[str, Any] = told
        return report

    monkeypatch.setattr(door.script, "status", status)
    door.script.story = [DONE[0], None]
    assert run(door, "scale", 2, "--wait") == 0
    assert turns == []
    assert f"waiting: {WAITING}" in capsys.readouterr().out


def test_a_controller_that_does_not_come_back_is_not_waited_for_for_ever(
    door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    door.script.story, door.script.report = [DONE[0], None], service_report(**STARTING)
    said = fails(capsys, door, "scale", 2, "--wait", "--timeout", "1")
    assert said.startswith(f"shoal: {LOST}: {WAITING}; `shoal experts status")


def test_another_change_of_the_same_id_is_not_taken_for_it(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers are saved soon after a change has begun, and not before."""
    others = change_document(5, "done", kind="drain", joining=[], leaving=["host-1"], epoch=8)
    door.script.story, door.script.report = [DONE[0], others], service_report(members=["host-0"])
    assert LOST in fails(capsys, door, "scale", 2, "--wait")


@pytest.mark.parametrize(
    ("asked", "report", "done", "said"),
    [
        ({"kind": "drain", "joining": []}, {"members": ["host-1"]}, True, "holds: host-0 has left"),
        ({"kind": "drain", "joining": []}, {}, False, "does not hold: host-0 has not left; ask again"),
        ({"replicas": 2}, {"replicas": 2, "extra": 0}, True, "holds: replicas 2, extra 0"),
        ({"replicas": 2}, {"replicas": 1, "extra": 0}, False, "does not hold: replicas 1 instead of 2; ask again"),
        ({"replicas": 2, "extra": 4}, {}, False, "does not hold: extra 1 instead of 4; ask again"),
        ({"kind": "rebalance"}, {}, False, "whether it was committed cannot be told"),
        ({"kind": "scale"}, {}, False, "whether it was committed cannot be told"),
        ({"kind": "drain"}, {"state": "failed", "reason": "no config.json"}, False, "cannot start: no config.json"),
        ({"phase": "retire", "epoch": None}, {}, True, "it was committed, and"),
    ],
)
def test_what_a_report_shows_of_a_change(asked: dict[str, Any], report: dict[str, Any], done: bool, said: str) -> None:
    nobody: dict[str, Any] = {"kind": "replicas", "joining": [], "leaving": ["host-0"] if "joining" in asked else []}
    outcome = judge(change_document() | nobody | asked, service_report(**report), "shoal experts status")
    assert (outcome.failure is None, outcome.note is not None) == (done, done)
    assert said in (outcome.note or outcome.failure or "")
