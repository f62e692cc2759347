"""`shoal experts drain --to` and `--node`, and services on other machines, against the application itself."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.change import ChangeRefused, Wish
from services.cli import main
from services.state import ServiceRecord, write_record
from tests.services.script import change_document, service_report
from tests.services.test_experts_command import AWAY, DONE, ROLLED_BACK, Door, door, fails, run

__all__ = ["door"]

UNDER_WAY = {"done": False, "change": DONE[0]}
NOT_YET: dict[str, Any] = {"done": False, "change": None}
ALL_DONE: dict[str, Any] = {"done": True, "change": None}


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.make_room.POLL_S", 0.01)
    monkeypatch.setattr("services.waiting.GONE_S", 0.05)
    for name in ("SHOAL_URL", "SHOAL_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def closed() -> Iterator[int]:
    """A port where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_waiting_asks_again_until_it_is_done(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.room_answers = [NOT_YET, UNDER_WAY, NOT_YET, ALL_DONE]
    door.script.story = [DONE[4]]
    assert run(door, "drain", "--to", 2, "--wait") == 0
    assert door.script.rooms == [(2, None)] * 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "plan: host-2 joins, host-0 leaves"
    assert lines[-2:] == ["change-3 (scale) done at epoch 8 after 3.5 s", "done"]


def test_a_service_that_is_not_ready_is_waited_for(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    door.script.refusal = ChangeRefused("the service is not ready: ask again when it is", busy=True)
    assert "not ready: ask again" in fails(capsys, door, "drain", "--to", 1)
    said = fails(capsys, door, "drain", "--to", 1, "--wait", "--timeout", "0.2")
    assert "not done after 0.2 s: the service is not ready" in said
    assert len(door.script.rooms) > 3
    older = ChangeRefused("not ready", busy=True)  # as an older service says it, without a code of its own
    turns: Iterator[Exception | None] = iter([AWAY, door.script.refusal, AWAY, older, None])
    make_room = door.script.make_room

    async def ready_later(hosts: int | None, node: str | None) -> dict[str, Any]:
        door.script.refusal = next(turns)
        return await make_room(hosts, node)

    monkeypatch.setattr(door.script, "make_room", ready_later)
    assert run(door, "drain", "--to", 1, "--wait") == 0
    assert capsys.readouterr().out == "done\n"


def test_a_change_that_a_new_controller_does_not_know_is_begun_again(
    door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    door.script.room_answers = [UNDER_WAY, NOT_YET, UNDER_WAY, ALL_DONE]
    door.script.story = [None, DONE[4]]
    assert run(door, "drain", "--to", 2, "--wait") == 0
    assert len(door.script.rooms) == 4
    assert capsys.readouterr().out.splitlines()[-2:] == ["change-3 (scale) done at epoch 8 after 3.5 s", "done"]


def test_a_change_that_takes_too_long_says_where_it_is(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.room_answers, door.script.story = [UNDER_WAY], [DONE[1]]
    said = fails(capsys, door, "drain", "--to", 2, "--wait", "--timeout", "1")
    assert "change-3 is not over after 1 s" in said
    assert "in phase 'prepare'; it goes on" in said


def test_a_node_is_named_as_it_was_given(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.room_answers = [UNDER_WAY]
    assert run(door, "drain", "--node", "10.0.0.7") == 0
    assert door.script.rooms == [(None, "10.0.0.7")]
    assert capsys.readouterr().out.startswith("change-3 (scale) plan with 0 of 4")
    door.script.room_answers = [NOT_YET]
    assert run(door, "drain", "--node", "10.0.0.7") == 0
    assert "--wait shows it through" in capsys.readouterr().out


def test_scripts_get_the_answer(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.room_answers = [UNDER_WAY, ALL_DONE]
    door.script.story = [DONE[4]]
    assert run(door, "drain", "--to", 2, "--wait", "--json") == 0
    assert json.loads(capsys.readouterr().out) == ALL_DONE


def test_what_goes_wrong_is_said(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.refusal = ChangeRefused("node a is the last one for expert hosts: add another before it is emptied")
    assert "is the last one" in fails(capsys, door, "drain", "--node", "a", "--wait")
    door.script.refusal = None
    door.script.room_answers, door.script.story = [UNDER_WAY], [ROLLED_BACK]
    assert "host-2 was lost" in fails(capsys, door, "drain", "--to", 1, "--wait")
    door.script.room_answers = [NOT_YET]
    assert "not done after 0.05 s; it goes on" in fails(capsys, door, "drain", "--to", 1, "--wait", "--timeout", "0.05")


def test_a_controller_that_is_away_is_waited_for(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.refusal = AWAY
    said = fails(capsys, door, "drain", "--to", 1, "--wait", "--timeout", "0.2")
    assert "not done after 0.2 s: the controller is being restarted" in said
    assert len(door.script.rooms) > 2
    assert "ask again" in fails(capsys, door, "drain", "--to", 1)


@pytest.mark.parametrize("which", [["--to", "2"], ["--node", "a"], ["host-1"]])
def test_where_nothing_runs_there_is_nothing_to_drain(
    which: list[str], closed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    port = ["--port", str(closed)]
    command = ["experts", "drain", *which, "--wait", *port]
    assert main(command) == 1
    assert "no service runs" in capsys.readouterr().err
    assert main([*command, "--if-running"]) == 0
    assert "nothing to drain: no service runs" in capsys.readouterr().err
    monkeypatch.setenv("SHOAL_URL", f"http://127.0.0.1:{closed}")
    monkeypatch.setenv("SHOAL_ADMIN_TOKEN", "the-admin-token")
    assert main([*command[: -len(port)], "--if-running"]) == 0
    assert f"nothing to drain: http://127.0.0.1:{closed} does not answer" in capsys.readouterr().err
    write_record(ServiceRecord(closed, f"http://127.0.0.1:{closed}", os.getpid(), "m", "the-admin-token"))
    monkeypatch.delenv("SHOAL_URL")
    assert main([*command, "--if-running"]) == 0


def test_a_service_that_ends_meanwhile_needs_no_draining(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    door.script.refusal = AWAY
    monkeypatch.setattr("services.waiting.listens", lambda record: False)
    assert "nothing listens at" in fails(capsys, door, "drain", "--to", 1, "--wait")
    monkeypatch.setattr("services.experts_command.listens", lambda record: True)
    for which in (["--to", 1], ["host-1"]):
        assert run(door, "drain", *which, "--wait", "--if-running") == 0
        assert "nothing to drain" in capsys.readouterr().err


def test_a_service_elsewhere_is_found_by_its_address(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{door.port}"
    monkeypatch.setenv("SHOAL_ADMIN_TOKEN", "the-admin-token")
    assert main(["experts", "scale", "3", "--address", url + "/"]) == 0
    assert door.script.wishes == [Wish("scale", hosts=3)]
    assert f"`shoal experts status --address {url}` shows it" in capsys.readouterr().out
    monkeypatch.setenv("SHOAL_URL", url)
    door.script.report = service_report()
    for command in (["status"], ["experts", "status"]):
        assert main(command) == 0
        assert "epoch 7" in capsys.readouterr().out
    door.script.story = [change_document(), AWAY, DONE[4]]
    assert main(["experts", "rebalance", "--wait"]) == 0  # no process of it is known here, and it has not ended
    monkeypatch.setenv("SHOAL_ADMIN_TOKEN", "another")
    assert main(["experts", "status"]) == 1
    assert "with this service's key" in capsys.readouterr().err
    for wrong in ("10.0.0.7:8000", "http://::1:8000", "http://", "http://a..b", "http://10.0.0.7:88000"):
        assert main(["experts", "status", "--address", wrong]) == 1
        assert "expected a URL, such as http://" in capsys.readouterr().err
    monkeypatch.delenv("SHOAL_ADMIN_TOKEN")
    for without in (["status"], ["experts", "drain", "--to", "1", "--wait"]):
        assert main(without) == 1
        assert f"set SHOAL_ADMIN_TOKEN to the admin token of {url}" in capsys.readouterr().err


def test_a_port_that_is_given_is_this_machines(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_URL", "http://127.0.0.1:9")
    door.script.report = service_report()
    assert run(door, "status") == 0
    with pytest.raises(SystemExit):
        main(["status", "--port", str(door.port), "--address", "http://127.0.0.1:9"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_status_shows_what_is_wanted_of_the_nodes(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = {"resource": "shoal_expert", "nodes": 4, "wanted": 2, "at_most": 2, "emptied": ["ab"]}
    door.script.report = service_report(nodes=nodes)
    assert run(door, "status") == 0
    assert (
        "one host on each node with shoal_expert: 4 nodes, 2 hosts wanted; at most 2 until nodes have gone; "
        "1 nodes being emptied" in capsys.readouterr().out
    )
