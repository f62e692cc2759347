"""What people and scripts are shown of a service's expert hosts."""

import datetime
import time
from typing import Any

from cluster.balance import Balance
from cluster.conductor import Conductor
from cluster.events import Event
from cluster.fleet import Fleet
from router.placement import Placement

SHOWN_CHANGES = 5


def state_name(stopping: bool, reason: str | None, conductor: Conductor | None, placement: Placement | None) -> str:
    """stopping, failed (for a reason), starting, ready, or degraded: a host is missing."""
    if stopping:
        return "stopping"
    if reason is not None:
        return "failed"
    if conductor is None or not conductor.ever_ready:
        return "starting"
    views = [conductor.roster.views[host_id] for host_id in conductor.committed.members]
    return "ready" if placement is not None and all(view.state == "ready" for view in views) else "degraded"


def describe_hosts(conductor: Conductor | None, fleet: Fleet | None, balance: Balance | None) -> list[dict[str, Any]]:
    """The hosts, members first and in their order, then those that join."""
    if conductor is None or fleet is None or balance is None:
        return []
    views = conductor.roster.views
    shares = balance.shares(conductor.placement, time.monotonic())
    members = [host_id for host_id in conductor.committed.members if host_id in views]
    described: list[dict[str, Any]] = []
    for host_id in [*members, *(other for other in views if other not in members)]:
        view = views[host_id]
        life = fleet.find(host_id, view.generation)
        info = life.info if life is not None else None
        described.append(
            {
                "id": host_id,
                "pid": info.pid if info else None,
                "node": info.node if info else None,
                "state": "dead" if view.state == "expected" else view.state,
                "generation": view.generation,
                "experts": len(view.held),
                "bytes": info.nbytes if info else 0,
                "progress": list(life.progress) if life else [0, 1],
                "load_share": shares.get(host_id),
                "reason": view.reason or None,
            }
        )
    return described


def describe_difference(conductor: Conductor | None) -> str | None:
    """What is wrong where hosts do not all compute alike; None where they do."""
    kinds = conductor.roster.arithmetics() if conductor is not None else {}
    if len(kinds) < 2:
        return None
    told = " and ".join(f"{', '.join(hosts)} with {kind}" for kind, hosts in sorted(kinds.items()))
    return (
        f"hosts compute otherwise than others, {told}: a token may change with who answers; see `shoal doctor` on each"
    )


def residents(conductor: Conductor | None, fleet: Fleet | None) -> dict[str, tuple[str, int]]:
    """Id and generation of the members that serve, by the names of their actors, which may take guests."""
    if conductor is None or fleet is None:
        return {}
    views = [conductor.roster.views[host_id] for host_id in conductor.committed.members]
    lives = [fleet.find(view.id, view.generation) for view in views if view.state == "ready"]
    return {life.process.name: (life.host_id, life.generation) for life in lives if life is not None}


def describe_service(conductor: Conductor | None, balance: Balance | None) -> dict[str, Any]:
    """Members, replicas, changes, counts of events, and how even the load is."""
    if conductor is None or balance is None:
        return {
            "members": [],
            "replicas": None,
            "extra": None,
            "change": None,
            "changes": [],
            "events_total": {},
            "load": {"total": 0.0, "imbalance": None},
        }
    now_s = time.monotonic()
    change = conductor.change
    return {
        "members": list(conductor.committed.members),
        "replicas": conductor.committed.replicas,
        "extra": conductor.committed.extra,
        "change": change.describe() if change is not None else None,
        "changes": [each.describe() for each in conductor.changes[-SHOWN_CHANGES:]],
        "events_total": dict(conductor.events.counts),
        "load": {"total": balance.total(now_s), "imbalance": balance.imbalance(conductor.placement, now_s)},
    }


def describe_events(conductor: Conductor | None, after: int, limit: int) -> list[dict[str, Any]]:
    """Events after number `after`, oldest first."""
    if conductor is None:
        return []
    began_s = time.time() - time.monotonic()
    return [_describe(event, began_s) for event in conductor.events.after(after, limit)]


def _describe(event: Event, began_s: float) -> dict[str, Any]:
    at = datetime.datetime.fromtimestamp(began_s + event.at_s, datetime.UTC)
    return {
        "number": event.number,
        "kind": event.kind,
        "at": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "fields": event.fields,
    }
