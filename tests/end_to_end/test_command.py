"""`shoal serve` from start to stop, two at once, and nothing left afterwards."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.clients import client, complete, free_port, wait_until

pytestmark = pytest.mark.ray

Shoal = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables under which no service of this machine is seen; ends what a failed test left."""
    variables = os.environ | {"XDG_STATE_HOME": str(tmp_path), "COLUMNS": "200"}
    yield variables
    for record in (tmp_path / "shoal").glob("*.json"):
        os.kill(json.loads(record.read_text())["pid"], signal.SIGTERM)


@pytest.fixture
def shoal(environment: dict[str, str]) -> Shoal:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "services.cli", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run


def members(report: dict[str, Any]) -> list[int]:
    rows = [*report["expert_hosts"], *report["attention_workers"], *report["standby"], report["controller"], report]
    return [row["pid"] for row in rows]


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_two_services_run_side_by_side_and_leave_nothing(
    checkpoint: Callable[[str], Path], shoal: Shoal, environment: dict[str, str], tmp_path: Path
) -> None:
    first, second = free_port(), free_port()
    path = checkpoint("tiny")
    sessions = set(Path("/tmp").glob("shoal-ray-*"))

    started = shoal("serve", path, "--port", first, "--expert-hosts", 3, "--threads", 1, "--detach")
    assert started.returncode == 0, started.stderr
    log = (tmp_path / "foreground.log").open("w+")
    command = [sys.executable, "-m", "services.cli", "serve", str(path), "--port", str(second), "--threads", "1"]
    command.append("--auto-rebalance")
    foreground = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    wait_until(lambda: shoal("status", "--port", second, "--json").returncode == 0)

    reports = [json.loads(shoal("status", "--port", port, "--json").stdout) for port in (first, second)]
    assert [report["url"] for report in reports] == [f"http://127.0.0.1:{port}" for port in (first, second)]
    assert [len(report["expert_hosts"]) for report in reports] == [3, 2]
    assert not set(members(reports[0])) & set(members(reports[1]))
    for host in reports[0]["expert_hosts"]:
        assert (host["state"], host["generation"]) == ("ready", 1)
    assert sum(host["experts"] for host in reports[0]["expert_hosts"]) == 3 * 16
    texts = [complete(client(f"http://127.0.0.1:{port}"), [5, 6, 7], 16) for port in (first, second)]
    assert texts[0] == texts[1] != ""

    asked = shoal("chat", "hello", "--port", first, "--max-tokens", 8, "--temperature", 0)
    assert asked.returncode == 0
    assert asked.stdout.strip()
    scaled = shoal("experts", "scale", 2, "--leaving", "host-1", "--wait", "--port", first)
    assert scaled.returncode == 0, scaled.stderr
    assert "retire" in scaled.stdout
    changed = json.loads(shoal("experts", "status", "--json", "--port", first).stdout)
    assert [host["id"] for host in changed["expert_hosts"]] == ["host-0", "host-2"]
    assert sum(host["experts"] for host in changed["expert_hosts"]) == 3 * 16
    refused = shoal("experts", "drain", "host-9", "--wait", "--port", first)
    assert (refused.returncode, "host-0, host-2" in refused.stderr) == (1, True)
    assert complete(client(f"http://127.0.0.1:{first}"), [5, 6, 7], 16) == texts[0]
    reports[0] = json.loads(shoal("status", "--port", first, "--json").stdout)

    taken = shoal("serve", path, "--port", first)
    assert (taken.returncode, "stop" in taken.stderr) == (1, True)
    missing = shoal("status", "--port", free_port())
    assert (missing.returncode, str(first) in missing.stderr) == (1, True)

    assert experts_moved_by_themselves(shoal, second)
    os.kill(foreground.pid, signal.SIGINT)
    assert foreground.wait(60) == 0
    assert complete(client(f"http://127.0.0.1:{first}"), [5, 6, 7], 16) == texts[0]  # the other one lives on
    assert shoal("stop", "--port", first).returncode == 0

    pids = [pid for report in reports for pid in members(report)]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20)
    assert can_bind(first)
    assert can_bind(second)
    assert set(Path("/tmp").glob("shoal-ray-*")) == sessions
    assert not list((tmp_path / "shoal").glob("*.json"))
    log.seek(0)
    assert "Traceback" not in log.read()


def experts_moved_by_themselves(shoal: Shoal, port: int) -> bool:
    """Ask for one thing again and again, which few experts answer; the answer stays, and the experts are spread."""
    api = client(f"http://127.0.0.1:{port}")
    before = complete(api, [3] * 16, 128)

    def spread() -> bool:
        assert complete(api, [3] * 16, 128) == before
        changes = json.loads(shoal("experts", "status", "--json", "--port", port).stdout)["changes"]
        return any(change["kind"] == "rebalance" and change["phase"] == "done" for change in changes)

    wait_until(spread)
    shown = shoal("experts", "status", "--port", port).stdout
    return "(rebalance) done" in shown and "because of mean imbalance" in shown


def test_a_signal_while_starting_ends_it(
    checkpoint: Callable[[str], Path], environment: dict[str, str], tmp_path: Path
) -> None:
    sessions = set(Path("/tmp").glob("shoal-ray-*"))
    command = [sys.executable, "-m", "services.cli", "serve", str(checkpoint("tiny")), "--port", str(free_port())]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: bool(set(Path("/tmp").glob("shoal-ray-*")) - sessions))
    time.sleep(1.0)  # somewhere between Ray's first process and the last host
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    wait_until(lambda: set(Path("/tmp").glob("shoal-ray-*")) == sessions, 20)
    assert not list((tmp_path / "shoal").glob("*.json"))


@pytest.mark.parametrize("ready", [True, False])
def test_ended_with_all_of_its_processes_it_leaves_nothing(
    checkpoint: Callable[[str], Path], environment: dict[str, str], tmp_path: Path, ready: bool
) -> None:
    """As systemd ends a service: Ray cannot be asked any more."""
    sessions, port = set(Path("/tmp").glob("shoal-ray-*")), free_port()
    command = [sys.executable, "-m", "services.cli", "serve", str(checkpoint("tiny")), "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    if ready:
        assert any("Ctrl-C stops it" in line for line in process.stdout)
    else:
        wait_until(lambda: not can_bind(port))  # Serve's proxy is there, and its replicas are not
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
    assert set(Path("/tmp").glob("shoal-ray-*")) == sessions
    assert not list((tmp_path / "shoal").glob("*.json"))
    wait_until(lambda: not session_processes(process.pid), 20)


def session_processes(leader: int) -> list[str]:
    """What is left of those that a process started, in the session that it leads."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, fields = status.read_text().rsplit(")", 1)
            state, _, _, session = fields.split()[:4]
            if int(session) == leader and state != "Z":
                found.append(name)
    return found
