"""A run that names a service is told beforehand what is there, and what to do, when that service cannot take it in."""

import json
import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.spec import CONTROLLER_NAME
from services.state import ServiceRecord, identity, read_record, remove_record, state_dir, write_record
from services.training import session
from services.training.session import ServiceUnusable, check_service, check_status, find_record


def record(port: int, ray_address: str | None = "127.0.0.1:7") -> ServiceRecord:
    url = f"http://127.0.0.1:{port}"
    process = identity(os.getpid())
    return ServiceRecord(port, url, os.getpid(), "m", "secret-of-the-test", ray_address=ray_address, process=process)


def status(*states: str, state: str = "ready", reason: str | None = None) -> dict[str, Any]:
    hosts = [{"id": f"host-{number}", "state": each} for number, each in enumerate(states)]
    return {"state": state, "reason": reason, "expert_hosts": hosts}


def test_the_ray_of_a_service_is_in_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    write_record(record(8123))
    found = read_record(8123)
    assert found is not None
    assert find_record("p8123", [record(8000, "127.0.0.1:1"), found]) == record(8123)
    path = state_dir() / "8123.json"
    raw = json.loads(path.read_text())
    del raw["ray_address"]  # as an earlier release wrote it
    path.write_text(json.dumps(raw))
    assert read_record(8123) == record(8123, None)


def test_what_runs_here_is_named() -> None:
    with pytest.raises(
        ServiceUnusable, match=r"'p8000'; there are the services p8100, p8200 on this machine.*RAY_ADDRESS"
    ):
        find_record("p8000", [record(8200), record(8100)])
    with pytest.raises(ServiceUnusable, match="there is no service on this machine"):
        find_record("p8000", [])
    with pytest.raises(ServiceUnusable, match="whose Ray has not started yet"):
        find_record("p8000", [record(8000, None)])


def test_a_service_must_be_ready_and_have_as_many_hosts() -> None:
    check_status("p8000", 2, status("ready", "ready"))
    check_status("p8000", 1, status("ready", "loading"))
    with pytest.raises(ServiceUnusable, match=r"the service p8000 is failed \(no file\): begin again when it is ready"):
        check_status("p8000", 1, status(state="failed", reason="no file"))
    with pytest.raises(ServiceUnusable, match="the service p8000 is starting: "):
        check_status("p8000", 1, status(state="starting"))
    with pytest.raises(
        ServiceUnusable, match=r"experts.hosts is 3; .* has 2 expert hosts \(host-0, host-2\): use at most 2, .*scale 3"
    ):
        check_status("p8000", 3, status("ready", "dead", "ready"))


def test_a_service_that_is_not_on_this_ray_is_told_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    named = [
        {"name": CONTROLLER_NAME, "namespace": "shoal-p8100"},
        {"name": "expert:1", "namespace": "shoal-p8200"},
        {"name": CONTROLLER_NAME, "namespace": "shoal-train-mine"},
        {"name": CONTROLLER_NAME, "namespace": "serve"},
    ]

    def nobody(name: str, namespace: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(ray, "get_actor", nobody)
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: named)
    with pytest.raises(ServiceUnusable, match="'p8000'; there are the services p8100 on this Ray"):
        check_service("p8000", 1)


def test_a_run_with_a_service_joins_its_ray_and_one_without_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(ray, "init", lambda address, **options: joined.append(address))
    monkeypatch.setattr(ray, "shutdown", lambda: joined.append("left"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    write_record(record(8000))
    told = threading.Event()
    with session.ray_of_run("p8000", told.set, told.set, told.is_set):
        assert joined == ["127.0.0.1:7"]
        assert not told.wait(2 * session.FOLLOW_S)
        remove_record(8000)  # the first thing that a service does when it stops
        assert told.wait(20 * session.FOLLOW_S)
    assert joined == ["127.0.0.1:7", "left"]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with session.ray_of_run("shoal", told.set, told.set, told.is_set):
        assert joined[2:] == ["auto"]


def test_a_run_whose_service_is_gone_with_its_ray_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(session, "GONE_S", 0.05)
    monkeypatch.setattr(session, "FOLLOW_S", 0.01)
    ended: list[int] = []
    monkeypatch.setattr(session.os, "_exit", ended.append)
    told: list[str] = []
    with subprocess.Popen(["sleep", "60"]) as service:
        found = replace(record(8000), pid=service.pid, process=identity(service.pid))
        write_record(found)
        follow = (found, threading.Event(), lambda: told.append("ends"), lambda: told.append("gone"))
        thread = threading.Thread(target=session._follow, args=follow)
        thread.start()
        thread.join(0.1)
        assert (thread.is_alive(), told) == (True, [])
        remove_record(8000)
        thread.join(0.1)
        assert (thread.is_alive(), told) == (True, ["ends"])  # its processes are there, and a snapshot can be written
        service.kill()
        service.wait()
        thread.join(10)
    assert (thread.is_alive(), told, ended) == (False, ["ends", "gone"], [1])
