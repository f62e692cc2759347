"""What the controller knows of the attention workers follows from their heartbeats."""

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.attention_worker import AttentionWorker
from cluster.events import EventLog
from cluster.workers import LATE_S, SETTLED_S, SILENT_S, Workers
from router.placement import Host

TICK_S = 0.25


def beat(worker_id: str, address: str = "127.0.0.1:1", **counts: int) -> dict[str, Any]:
    known = {"rows_resent": 0, "resends": 0, "hedges": 0} | counts
    return {"id": worker_id, "address": address, "node": "node", "load": {}, "epoch": 1, **known}


def look(workers: Workers, from_s: float, to_s: float) -> list[str]:
    """As the controller does: at every tick from one time to another; who is silent at the last."""
    silent: list[str] = []
    for tick in range(round((to_s - from_s) / TICK_S) + 1):
        silent = workers.silent(from_s + tick * TICK_S)
    return silent


def test_the_version_rises_only_when_addresses_differ() -> None:
    workers = Workers(EventLog())
    workers.beat(beat("a"), 1.0)
    workers.beat(beat("a"), 2.0)
    assert (workers.version, workers.addresses()) == (1, {"a": "127.0.0.1:1"})
    workers.beat(beat("a", "127.0.0.1:2"), 3.0)
    assert (workers.version, workers.addresses()) == (2, {"a": "127.0.0.1:2"})
    workers.leave("a", "it said so", 4.0)
    workers.leave("a", "it said so", 4.0)
    assert (workers.version, workers.addresses()) == (3, {})


def test_who_is_not_heard_of_is_silent() -> None:
    workers = Workers(EventLog())
    workers.beat(beat("a"), 0.0)
    look(workers, 0.0, 1.0)
    workers.beat(beat("b"), 1.0)
    assert look(workers, 1.0, SILENT_S) == []
    assert look(workers, SILENT_S, SILENT_S + 0.5) == ["a"]


def test_a_controller_that_was_frozen_does_not_take_its_own_silence_for_its_workers() -> None:
    workers = Workers(EventLog())
    workers.beat(beat("a"), 0.0)
    workers.beat(beat("b"), 0.0)
    look(workers, 0.0, 1.0)
    thawed_s = 61.0
    assert workers.silent(thawed_s) == []
    workers.beat(beat("b"), thawed_s)  # of the heartbeats that came meanwhile, one is heard before the next look
    assert workers.silent(thawed_s) == []
    workers.beat(beat("b"), thawed_s + 3.0)
    assert look(workers, thawed_s, thawed_s + 3.0) == []  # 1 s before, at most 1 s for the time in between
    assert look(workers, thawed_s + 3.0, thawed_s + 3.5) == ["a"]


def test_a_controller_that_is_always_late_still_finds_the_silent() -> None:
    workers = Workers(EventLog())
    looks_s = [2.0 * LATE_S * look for look in range(12)]
    workers.beat(beat("a"), 0.0)
    silent_from_s = next(now_s for now_s in looks_s if workers.silent(now_s))
    assert SILENT_S < silent_from_s <= 3.0 * SILENT_S


def test_the_first_look_for_the_silent_finds_nobody() -> None:
    """A model is opened meanwhile, during which nothing is heard."""
    workers = Workers(EventLog())
    workers.beat(beat("a"), 0.0)
    assert workers.silent(60.0) == []
    assert look(workers, 60.0, 60.0 + SILENT_S + TICK_S) == ["a"]


def test_a_service_is_settled_once_a_worker_has_been_there_for_a_while() -> None:
    workers = Workers(EventLog())
    assert not workers.settled(1e9)
    workers.beat(beat("a"), 1.0)
    workers.beat(beat("b"), 2.0)
    workers.beat(beat("a"), 2.5)
    assert not workers.settled(1.0 + SETTLED_S - 0.1)
    assert workers.settled(1.0 + SETTLED_S)
    workers.leave("a", "it said so", 3.0)
    assert not workers.settled(2.0 + SETTLED_S - 0.1)


def test_after_a_controllers_death_nobody_is_told_of_some_of_the_workers() -> None:
    workers = Workers(EventLog(), heard_s=3.0)
    assert not workers.differ(-1, 0.0)
    workers.beat(beat("a"), 1.0)
    assert not workers.differ(-1, 2.9)
    workers.beat(beat("b"), 2.9)
    assert workers.differ(-1, 3.0)
    assert not workers.differ(workers.version, 3.0)
    assert Workers(EventLog()).differ(-1, 0.0)  # a first controller's are not waited for


def test_what_happened_is_told_once() -> None:
    events = EventLog()
    workers = Workers(events)
    workers.beat(beat("a", rows_resent=7, resends=1), 1.0)  # before this controller's time
    workers.beat(beat("a", rows_resent=19, resends=2, hedges=1), 2.0)
    workers.beat(beat("a", rows_resent=19, resends=2, hedges=1), 3.0)
    workers.leave("a", "it is silent", 9.0)
    assert [(event.kind, event.fields) for event in events.recent] == [
        ("worker_ready", {"worker": "a", "node": "node"}),
        ("rows_resent", {"worker": "a", "rows": 12, "resends": 1, "hedges": 1}),
        ("worker_left", {"worker": "a", "reason": "it is silent"}),
    ]


def test_people_see_no_address_and_no_load() -> None:
    workers = Workers(EventLog())
    workers.beat(beat("a"), 1.0)
    assert workers.describe() == [{"id": "a", "node": "node", "epoch": 1, "rows_resent": 0, "resends": 0, "hedges": 0}]


def test_people_see_which_way_rows_go_now() -> None:
    workers = Workers(EventLog())
    for ways in ({}, {"host-0": "grpc"}, {"host-0": "shared", "host-1": "nixl"}):
        workers.beat(beat("a") | {"ways": ways}, 1.0)
        assert [worker["ways"] for worker in workers.describe()] == [ways]


@dataclass
class Counts:
    """Of an engine or a client."""

    dispatches: int = 3


def test_a_worker_tells_of_the_hosts_of_the_newest_table_that_it_has_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, replaced = Host("host-0", 1, "a:1"), Host("host-1", 1, "a:2")
    successor, new = Host("host-1", 2, "a:3"), Host("host-2", 1, "a:4")
    told: list[dict[str, Any]] = []
    worker: Any = object.__new__(AttentionWorker)
    worker._id, worker._leaving, worker._beat_now = "attention-a", threading.Event(), threading.Event()
    worker._server = SimpleNamespace(address="127.0.0.1:1")
    worker._engine = SimpleNamespace(alive=True, stats=Counts)
    worker._client = SimpleNamespace(stats=Counts)
    worker._meter = SimpleNamespace(take=dict)
    placement: Any = None
    worker._placements = SimpleNamespace(epoch_in_use=lambda idle: (1, True), peek=lambda: placement)
    worker._transport = SimpleNamespace(ways=lambda: {successor: "nixl", asked: "shared", replaced: "grpc"})

    def greet(info: dict[str, Any]) -> bool:
        told.append(info)
        worker._leaving.set()
        worker._beat_now.set()
        return True

    worker._greet = greet
    here = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr("cluster.attention_worker.ray.get_runtime_context", lambda: here)
    for hosts in (None, (asked, replaced), (asked, successor, new)):
        placement = None if hosts is None else SimpleNamespace(hosts=hosts)
        worker._leaving.clear()
        worker._beat()
    assert [info["ways"] for info in told] == [
        {},
        {"host-0": "shared", "host-1": "grpc"},
        {"host-0": "shared", "host-1": "nixl"},
    ]
