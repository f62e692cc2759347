"""What `shoal status` says of the way that rows go."""

from typing import Any

import pytest

from services.admin_client import AdminClient
from services.cli import main
from services.status import MOST_NAMED, way_lines
from tests.services.script import Script, call, make_app, service_report


def worker(worker_id: str, **hosts_by_way: list[int]) -> dict[str, Any]:
    ways = {f"host-{index}": way for way, hosts in hosts_by_way.items() for index in hosts}
    return {"id": worker_id, "ways": ways}


@pytest.mark.parametrize(
    ("way", "line"),
    [("shared", "rows by shared memory"), ("nixl", "rows by NIXL"), ("grpc", "rows by gRPC")],
)
def test_rows_that_all_go_alike_take_one_line(way: str, line: str) -> None:
    assert way_lines([worker(f"attention-{name}", **{way: list(range(400))}) for name in "ab"]) == [line]


def test_workers_that_have_asked_nobody_are_not_spoken_of() -> None:
    assert way_lines([]) == []
    assert way_lines([worker("attention-a"), {"id": "attention-b"}]) == []  # the second is an older service's
    assert way_lines([worker("attention-a"), worker("attention-b", grpc=[0])]) == ["rows by gRPC"]


def test_where_ways_differ_each_worker_has_a_line_and_the_rarer_ones_have_their_hosts() -> None:
    assert way_lines(
        [
            worker("a", shared=[0, 4], nixl=[1, 2, 3, 5, 6], grpc=[7]),
            worker("b", nixl=[0, 1, 2]),
            worker("c", grpc=[1], shared=[0]),
        ]
    ) == [
        "a: rows by NIXL to 5 hosts, by shared memory to 2 hosts (host-0, host-4), by gRPC to 1 host (host-7)",
        "b: rows by NIXL to 3 hosts",
        "c: rows by shared memory to 1 host, by gRPC to 1 host (host-1)",
    ]


def test_a_line_stays_a_line_where_there_are_many_hosts() -> None:
    (line,) = way_lines([worker("a", nixl=list(range(1000)), grpc=list(range(1000, 1400)))])
    named = ", ".join(f"host-{1000 + index}" for index in range(MOST_NAMED))
    assert line == f"a: rows by NIXL to 1000 hosts, by gRPC to 400 hosts ({named} and {400 - MOST_NAMED} more)"


def test_status_shows_the_way_that_rows_go(
    script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script.report = service_report()
    app = make_app(script, admin_token="the-admin-token")
    headers = {"Authorization": "Bearer the-admin-token"}
    monkeypatch.setenv("SHOAL_ADMIN_TOKEN", "the-admin-token")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(AdminClient, "get", lambda client, path: call(app, "GET", path, headers=headers).json())
    address = ["--address", "http://127.0.0.1:9"]
    assert main(["status", *address]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "rows by shared memory"
    script.report["attention_workers"][0]["ways"]["host-1"] = "grpc"
    assert main(["status", *address]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == "attention-a: rows by shared memory to 1 host, by gRPC to 1 host (host-1)"
    assert main(["status", "--json", *address]) == 0
    assert '"host-1": "grpc"' in capsys.readouterr().out


@pytest.mark.parametrize("model", ["/models/lite[v2]", "/models/[/v2]", "/models/a:cat:b"])
def test_names_are_shown_as_they_are(
    script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """And so is the address of an IPv6 network, in which a console would see the mark of a style."""
    monkeypatch.setenv("SHOAL_ADMIN_TOKEN", "the-admin-token")
    monkeypatch.setattr(AdminClient, "get", lambda client, path: service_report(model=model))
    assert main(["status", "--address", "http://[fd00::5]:8000"]) == 0
    assert capsys.readouterr().out.startswith(f"http://[fd00::5]:8000  degraded  epoch 7  {model}\n")
