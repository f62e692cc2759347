"""What the controller knows of the attention workers follows from their heartbeats."""

from typing import Any

from cluster.events import EventLog
from cluster.workers import SETTLED_S, SILENT_S, Workers


def beat(worker_id: str, address: str = "127.0.0.1:1", **counts: int) -> dict[str, Any]:
    known = {"rows_resent": 0, "resends": 0, "hedges": 0} | counts
    return {"id": worker_id, "address": address, "node": "node", "load": {}, "epoch": 1, **known}


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
    workers.beat(beat("b"), 1.0)
    assert workers.silent(SILENT_S) == []
    assert workers.silent(SILENT_S + 0.5) == ["a"]


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
