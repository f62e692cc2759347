"""`shoal experts` against the application itself, over a scripted backend and a real socket."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from cluster.change import ChangeRefused, Wish, not_ready
from services.backend import GenerationFailed
from services.cli import main
from services.openai.errors import ApiError
from services.state import ServiceRecord, write_record
from tests.services.script import Script, change_document, make_app, service_report

DONE = [
    change_document(1),
    change_document(2, "prepare"),
    change_document(3, "prepare", pairs_loaded=2),
    change_document(4, "retire", pairs_loaded=4, epoch=8),
    change_document(5, "done", pairs_loaded=4, epoch=8, seconds={"plan": 1.0, "prepare": 2.0, "retire": 0.5}),
]
ROLLED_BACK = change_document(3, "rolled_back", reason="host-2 was lost: it does not answer")
AWAY = GenerationFailed("the controller is being restarted; ask again")
NOT_READY = not_ready(None)
STATUS = "`shoal experts status --port {port}` shows it"


@dataclass
class Door:
    """The application behind a real socket; `hiccups` requests find none behind it, and all while it is absent."""

    script: Script
    port: int
    absent: bool = False
    hiccups: int = 0
    hiccup_status: int = 500


@pytest.fixture
def door(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("services.follow_change.RETRY_S", 0.01)
    monkeypatch.setattr("services.experts_command.FOLLOW_S", 0.01)
    monkeypatch.setattr("services.waiting.POLL_S", 0.01)
    app = make_app(script, admin_token="the-admin-token")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    door = Door(script, listener.getsockname()[1])

    async def hesitant(scope: Scope, receive: Receive, send: Send) -> None:
        looks = scope["type"] == "http" and scope["path"].startswith("/admin/") and scope["method"] == "GET"
        if door.absent or (looks and door.hiccups):
            door.hiccups -= not door.absent
            status = 404 if door.absent else door.hiccup_status
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"Path not found"})
            return
        await app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(hesitant, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    write_record(ServiceRecord(door.port, f"http://127.0.0.1:{door.port}", os.getpid(), "m", "the-admin-token"))
    yield door
    server.should_exit = True
    thread.join(10)


def run(door: Door, *arguments: object) -> int:
    return main(["experts", *map(str, arguments), "--port", str(door.port)])


def fails(capsys: pytest.CaptureFixture[str], door: Door, *arguments: object) -> str:
    """The one line on stderr of a command that fails."""
    assert run(door, *arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "wish"),
    [
        (["scale", 3], Wish("scale", hosts=3)),
        (["scale", 1, "--leaving", "host-1", "host-0"], Wish("scale", hosts=1, leaving=("host-1", "host-0"))),
        (["rebalance"], Wish("rebalance")),
        (["drain", "host-1", "host-2"], Wish("drain", leaving=("host-1", "host-2"))),
        (["replicas", 2], Wish("replicas", replicas=2)),
        (["replicas", 2, "--extra", 0], Wish("replicas", replicas=2, extra=0)),
    ],
)
def test_a_change_is_begun_and_how_to_follow_it_said(
    door: Door, capsys: pytest.CaptureFixture[str], arguments: list[object], wish: Wish
) -> None:
    assert run(door, *arguments) == 0
    said = capsys.readouterr().out
    assert door.script.wishes == [wish]
    assert said.startswith("change-3 (scale) has begun")
    assert f"`shoal experts events --follow --port {door.port}`" in said
    assert door.script.watched == []
    assert run(door, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out) == change_document()


def test_waiting_shows_each_phase_in_a_line(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.story = list(DONE)
    assert run(door, "scale", 2, "--wait") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "plan: host-2 joins, host-0 leaves",
        "prepare: 4 expert copies to load",
        "prepare: 2 of 4 expert copies loaded",
        "commit",
        "retire",
        "change-3 (scale) done at epoch 8 after 3.5 s",
    ]
    assert shown.err == ""
    assert [seen for _, seen, _ in door.script.watched] == [1, 2, 3, 4]


def test_phases_that_passed_unseen_are_shown_once(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.story = [DONE[0], DONE[0], DONE[3], DONE[3], DONE[4]]
    assert run(door, "rebalance", "--wait") == 0
    phases = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert phases[:-1] == ["plan", "prepare", "commit", "retire"]


def test_a_terminal_gets_a_bar(door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    door.script.story = list(DONE)
    assert run(door, "scale", 2, "--wait") == 0
    shown = capsys.readouterr().out
    assert "\x1b[" in shown
    assert "→" in shown
    assert "change-3 (scale) done" in shown.splitlines()[-1]


def test_json_is_all_that_a_script_reads(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.story = list(DONE)
    assert run(door, "scale", 2, "--wait", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == DONE[-1]
    assert shown.err == ""
    door.script.story = [DONE[0], ROLLED_BACK]
    assert run(door, "scale", 2, "--wait", "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == ROLLED_BACK
    assert shown.err == "shoal: change-3 was rolled back: host-2 was lost: it does not answer\n"


def test_a_change_that_is_undone_says_why(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.story = [DONE[0], ROLLED_BACK]
    assert "host-2 was lost: it does not answer" in fails(capsys, door, "scale", 3, "--wait")


@pytest.mark.parametrize("wait", [[], ["--wait"]])
def test_a_refused_change_says_why(door: Door, capsys: pytest.CaptureFixture[str], wait: list[str]) -> None:
    door.script.refusal = ChangeRefused(
        "change-2 (drain, phase 'prepare') is under way: ask again when it is over", True
    )
    said = fails(capsys, door, "scale", 3, *wait)
    assert said == "shoal: change-2 (drain, phase 'prepare') is under way: ask again when it is over"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scale", 0], "hosts: Input should be greater than or equal to 1; given 0"),
        (["scale", 2, "--leaving", "a", "a"], "'a' is named more than once; name each host once"),
        (["drain", ""], "at least 1 character; given ''"),
        (["replicas", 0], "replicas: Input should be greater than or equal to 1; given 0"),
        (["replicas", 1, "--extra", -1], "extra: Input should be greater than or equal to 0; given -1"),
    ],
)
def test_a_value_out_of_range_is_named(
    door: Door, capsys: pytest.CaptureFixture[str], arguments: list[object], said: str
) -> None:
    assert said in fails(capsys, door, *arguments)
    assert door.script.wishes == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: ACTION"),
        (["scale"], "required: N"),
        (["scale", "two"], "argument N: invalid int value: 'two'"),
        (["drain"], "one of the arguments HOST --to --node is required"),
        (["drain", "host-1", "--to", "2"], "argument --to: not allowed with argument HOST"),
        (["drain", "--to", "0"], "argument --to: 0 given; expected at least 1"),
        (["drain", "--to", "few"], "argument --to: invalid count value: 'few'"),
        (["rebalance", "--timeout", "0"], "--timeout: 0 given; expected a number of seconds above 0"),
        (["rebalance", "--timeout", "soon"], "invalid seconds value: 'soon'"),
        (["fly"], "invalid choice: 'fly'"),
        (["drain", "h\udce9"], "argument HOST: 'h\\udce9' given; expected text in UTF-8"),
        (["drain", "--node", "h\udce9"], "argument --node: 'h\\udce9' given"),
        (["scale", "2", "--leaving", "h\udce9"], "argument --leaving: 'h\\udce9' given"),
    ],
)
def test_a_wrong_command_line_exits_2(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["experts", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_restarts_and_hiccups_are_ridden_out(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.story = [DONE[0], AWAY, AWAY, DONE[1], AWAY, DONE[4]]
    door.hiccups = 3
    assert run(door, "scale", 2, "--wait") == 0
    assert "done at epoch 8" in capsys.readouterr().out
    door.script.story, door.hiccups, door.hiccup_status = [DONE[0], DONE[4]], 2, 404  # a proxy without its application
    assert run(door, "scale", 2, "--wait") == 0


@pytest.mark.parametrize(
    "arguments", [["scale", 2], ["rebalance"], ["drain", "host-0"], ["replicas", 2], ["scale", 2, "--json"]]
)
def test_a_controller_that_restarts_is_waited_for(
    door: Door, capsys: pytest.CaptureFixture[str], arguments: list[object]
) -> None:
    """It is away, then not ready, and then begins what was asked for, once."""
    door.script.story = [NOT_READY, AWAY, NOT_READY, NOT_READY, DONE[0], DONE[4]]
    assert run(door, *arguments, "--wait") == 0
    assert len(door.script.wishes) == 5
    assert len(door.script.watched) == 1
    shown = capsys.readouterr()
    progress = (shown.err if "--json" in arguments else shown.out).splitlines()
    assert progress[:3] == [f"waiting: {NOT_READY}", f"waiting: {AWAY}", f"waiting: {NOT_READY}"]
    if "--json" in arguments:
        assert json.loads(shown.out) == DONE[4]


def test_a_service_that_is_not_ready_in_time(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.story = [NOT_READY]
    said = fails(capsys, door, "scale", 2, "--wait", "--timeout", "0.3")
    assert said == f"shoal: {NOT_READY}; it was waited for 0.3 s"
    assert len(door.script.wishes) > 1
    door.script.wishes.clear()
    assert fails(capsys, door, "scale", 2, "--timeout", "2") == f"shoal: {NOT_READY}; --wait waits for it"
    assert len(door.script.wishes) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        ChangeRefused("change-2 (scale, phase 'plan') is under way: ask again when it is over", busy=True),
        ChangeRefused("there is no expert host 'host-1'; the hosts are host-0"),
        not_ready("the checkpoint has no config.json"),
    ],
)
def test_a_refusal_of_the_request_itself_is_not_waited_out(
    door: Door, capsys: pytest.CaptureFixture[str], refusal: ChangeRefused
) -> None:
    door.script.refusal = refusal
    assert fails(capsys, door, "drain", "host-1", "--wait") == f"shoal: {refusal}"
    assert len(door.script.wishes) == 1
    door.script.refusal = None
    door.script.story = [AWAY, refusal]
    maybe = f"a request that got no answer may have begun the change: {STATUS.format(port=door.port)}"
    assert fails(capsys, door, "drain", "host-1", "--wait") == f"shoal: {refusal}; {maybe}"


def test_a_change_that_takes_too_long_goes_on(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.story = [DONE[0], AWAY, DONE[1]]
    said = fails(capsys, door, "scale", 2, "--wait", "--timeout", "1")
    assert "change-3 is not over after 1 s, in phase 'prepare'; it goes on" in said
    door.script.story = [DONE[0], DONE[1], AWAY]
    said = fails(capsys, door, "scale", 2, "--wait", "--timeout", "1")
    assert f"change-3 was in phase 'prepare' when it was last seen, and after 1 s: {AWAY}" in said
    assert "it goes on" not in said


def test_a_service_that_ends_is_not_waited_for(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([True])  # while it is found
    monkeypatch.setattr("services.state.is_running", lambda pid: next(seen, False))
    door.script.story = [DONE[0], AWAY]
    assert "the service has ended, and change-3 with it" in fails(capsys, door, "scale", 2, "--wait")
    write_record(ServiceRecord(door.port, f"http://127.0.0.1:{door.port}", os.getpid(), "m", "the-admin-token"))
    seen = iter([True, True])
    door.script.story = [AWAY]
    assert f"127.0.0.1:{door.port} has ended" in fails(capsys, door, "scale", 2, "--wait", "--timeout", "9")


def test_a_service_that_does_not_answer(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.refusal = AWAY
    maybe = f"a request that got no answer may have begun the change: {STATUS.format(port=door.port)}"
    said = fails(capsys, door, "scale", 2, "--wait", "--timeout", "0.2")
    assert said == f"shoal: {AWAY}; it was waited for 0.2 s; {maybe}"
    assert fails(capsys, door, "scale", 2, "--timeout", "2") == f"shoal: {AWAY}; --wait waits for it; {maybe}"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        write_record(ServiceRecord(port, f"http://127.0.0.1:{port}", os.getpid(), "m", "the-admin-token"))
        assert "does not answer" in fails(capsys, Door(door.script, port), "status")
    assert "no service runs on port 1;" in fails(capsys, Door(door.script, 1), "rebalance")
    write_record(ServiceRecord(door.port, f"http://127.0.0.1:{door.port}", os.getpid(), "m", "another-token"))
    assert "with this service's key" in fails(capsys, door, "events")


def test_status_shows_hosts_load_and_changes(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.report = service_report(reason="host-1 is [gone]")
    door.script.report["changes"][0]["why"] = "3 hosts on 4 nodes"
    assert run(door, "status") == 0
    shown = capsys.readouterr().out
    assert "epoch 7  replicas 2  extra 1  imbalance 1.50" in shown
    assert "host-1 is [gone]" in shown
    assert "75.0%" in shown
    assert "change-3 (scale) done at epoch 7 after 4.0 s because of 3 hosts on 4 nodes" in shown
    assert run(door, "status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["members"] == ["host-0", "host-1"]


def test_the_status_of_a_service_that_starts(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {"replicas": None, "extra": None, "members": [], "expert_hosts": [], "changes": []}
    door.script.report = service_report(state="starting", load={"total": 0.0, "imbalance": None}, **unknown)
    assert run(door, "status") == 0
    assert "starting  epoch 7  replicas -  extra -  imbalance -" in capsys.readouterr().out


def event(number: int, kind: str = "epoch", **fields: Any) -> dict[str, Any]:
    return {"number": number, "kind": kind, "at": "2026-11-25T10:11:12.345Z", "fields": fields}


def test_events_are_shown_a_line_each(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.script.log = [event(1, "host_died", host="host-1", reason="it does not answer"), event(2)]
    assert run(door, "events") == 0
    assert capsys.readouterr().out.splitlines() == [
        '2026-11-25T10:11:12.345Z  host_died  host=host-1 reason="it does not answer"',
        "2026-11-25T10:11:12.345Z  epoch",
    ]
    assert run(door, "events", "--json") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == door.script.log


FIRST = [event(number, n=number) for number in range(1, 6)]
NEXT = [event(number, n=10 * number) for number in range(1, 4)]  # of the next controller, numbered from 1 again


@pytest.mark.parametrize(
    ("moments", "shown"),
    [
        ([FIRST[:2], FIRST[:2], AWAY, FIRST], [1, 2, 3, 4, 5]),
        ([[], FIRST[:1], FIRST], [1, 2, 3, 4, 5]),
        ([FIRST, NEXT[:1], NEXT[:1], NEXT], [1, 2, 3, 4, 5, 10, 20, 30]),
        ([FIRST[:2], NEXT, NEXT], [1, 2, 10, 20, 30]),
        ([FIRST[:2], [], [], NEXT], [1, 2, 10, 20, 30]),
    ],
)
def test_followed_events_come_once_whoever_numbers_them(
    door: Door,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    moments: list[Any],
    shown: list[int],
) -> None:
    """Each call sees the next moment's log; after the last, the service refuses."""
    left = iter([*moments, ApiError("enough", 400)])

    async def events(after: int, limit: int) -> list[dict[str, Any]]:
        log = next(left)
        if isinstance(log, Exception):
            raise log
        return [event for event in log if event["number"] > after][:limit]

    monkeypatch.setattr(door.script, "events", events)
    assert run(door, "events", "--follow", "--json") == 1
    told = capsys.readouterr()
    assert [json.loads(line)["fields"]["n"] for line in told.out.splitlines()] == shown
    assert told.err == "shoal: enough\n"
