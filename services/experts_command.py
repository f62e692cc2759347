"""`shoal experts`: see and change the expert hosts of a running service."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from services.admin_client import AdminClient, NotAnswered
from services.commands import CommandError, NoService, find_service
from services.follow_change import follow, shown, summary, to_type
from services.forgotten_change import find_out
from services.make_room import make_room
from services.state import ServiceRecord
from services.waiting import Deadline, TimeUp, listens, until_answered

EVENTS = 500  # that are asked for at once: as many as the service remembers
FOLLOW_S = 1.0


def status(options: argparse.Namespace) -> int:
    """Print the hosts, what each holds and computes, and the last changes."""
    report = AdminClient(find_service(options)).get("/admin/experts")
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    console = Console(highlight=False, markup=False, emoji=False)
    imbalance = report["load"]["imbalance"]
    counts = {name: report[name] for name in ("epoch", "replicas", "extra")}
    counts["imbalance"] = None if imbalance is None else f"{imbalance:.2f}"
    words = [f"{name} {'-' if value is None else value}" for name, value in counts.items()]
    console.print("  ".join((report["state"], *words)), soft_wrap=True)
    if report["nodes"]:
        console.print(_following(report["nodes"]), markup=False, soft_wrap=True)
    if report["reason"]:
        console.print(report["reason"], markup=False, soft_wrap=True)
    table = Table()
    for name in ("id", "state", "generation", "experts", "load", "MiB", "pid", "node"):
        table.add_column(name)
    for host in report["expert_hosts"]:
        load = "-" if host["load_share"] is None else f"{host['load_share']:.1%}"
        size = f"{host['bytes'] / 2**20:.0f}"
        cells = (host["id"], host["state"], host["generation"], host["experts"], load, size, host["pid"], host["node"])
        table.add_row(*(str(cell)[:24] for cell in cells))
    console.print(table)
    for change in report["changes"]:
        console.print(summary(change), markup=False, soft_wrap=True)
    return 0


def scale(options: argparse.Namespace) -> int:
    """Another number of hosts."""
    return _change(options, "scale", {"hosts": options.hosts, "leaving": options.leaving})


def rebalance(options: argparse.Namespace) -> int:
    """The same hosts, the experts spread by their load."""
    return _change(options, "rebalance", {})


def drain(options: argparse.Namespace) -> int:
    """Without some hosts: those that are named, those beyond --to, or those on --node."""
    try:
        record = find_service(options)
        if options.if_running and not listens(record):
            raise NoService(f"{record.url} does not answer")
        if options.hosts:
            return _change(options, "drain", {"hosts": options.hosts})
        return make_room(record, options)
    except NoService as error:
        if not options.if_running:
            raise
        print(f"nothing to drain: {error}", file=sys.stderr)
        return 0


def replicas(options: argparse.Namespace) -> int:
    """Another number of copies."""
    extra = {} if options.extra is None else {"extra": options.extra}
    return _change(options, "replicas", {"replicas": options.replicas} | extra)


def events(options: argparse.Namespace) -> int:
    """Print what the service remembers, and with --follow what comes, a line each."""
    client = AdminClient(find_service(options))
    happened = _follow_events(client) if options.follow else client.get("/admin/events", {"limit": EVENTS})["events"]
    for event in happened:
        print(json.dumps(event) if options.json else _event_line(event), flush=True)
    return 0


def _change(options: argparse.Namespace, action: str, body: dict[str, Any]) -> int:
    """Begin a change, and with --wait see it through, restarts of the controller included.

    Raises CommandError when it is refused, undone or late, as NoService when the service ended before it began.
    """
    client = AdminClient(find_service(options))
    console = Console(stderr=options.json, highlight=False, markup=False, emoji=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def waiting(hindrance: str) -> None:
        say(f"waiting: {hindrance}")

    deadline = Deadline(options.timeout if options.wait else 0.0)
    change = _begin(client, action, body, deadline, waiting)
    if not options.wait:
        print(json.dumps(change, indent=2) if options.json else _begun(change, client.record))
        return 0
    with shown(console, lines=not options.json) as show:
        outcome = follow(client, change, deadline, show)
    if not outcome.known:
        outcome = find_out(client, outcome.change, deadline, waiting)
    if options.json:
        print(json.dumps(outcome.change, indent=2))
    if outcome.failure is not None:
        raise CommandError(outcome.failure)
    if outcome.note is not None or not options.json:
        say(outcome.note or summary(outcome.change))
    return 0


def _begin(
    client: AdminClient, action: str, body: dict[str, Any], deadline: Deadline, say: Callable[[str], None]
) -> dict[str, Any]:
    """The change that has begun; a service that is away, or not ready, is waited for until the deadline."""
    unanswered = False

    def ask() -> dict[str, Any]:
        nonlocal unanswered
        try:
            return client.post(f"/admin/experts/{action}", body)
        except NotAnswered:
            unanswered = True
            raise

    try:
        return until_answered(client, ask, deadline, say)
    except NoService:
        raise
    except CommandError as error:
        words = [str(error)]
        if isinstance(error, TimeUp):
            waited = deadline.timeout_s > 0
            words.append(f"it was waited for {deadline.timeout_s:g} s" if waited else "--wait waits for it")
        if unanswered:
            check = to_type("status", client.record)
            words.append(f"a request that got no answer may have begun the change: `{check}` shows it")
        raise CommandError("; ".join(words)) from error


def _begun(change: dict[str, Any], record: ServiceRecord) -> str:
    return (
        f"{change['id']} ({change['kind']}) has begun: `{to_type('status', record)}` shows it, "
        f"`{to_type('events --follow', record)}` what happens"
    )


def _following(nodes: dict[str, Any]) -> str:
    """Desired and actual, where hosts follow nodes."""
    words = [f"one host on each node with {nodes['resource']}: {nodes['nodes']} nodes, {nodes['wanted']} hosts wanted"]
    if nodes["at_most"] is not None:
        words.append(f"at most {nodes['at_most']} until nodes have gone")
    if nodes["emptied"]:
        words.append(f"{len(nodes['emptied'])} nodes being emptied")
    return "; ".join(words)


def _follow_events(client: AdminClient) -> Iterator[dict[str, Any]]:
    """Every event once. The last one is asked for again: a controller that was restarted numbers anew."""
    last: dict[str, Any] | None = None
    events = client.get("/admin/events", {"limit": EVENTS})["events"]
    while True:
        known = [event for event in events if last is not None and _same(event, last)]
        if last is not None and not known and (not events or events[0]["number"] <= last["number"]):
            last, events = None, _more(client, 0)
            continue
        for event in events:
            if event not in known:
                yield event
                last = event
        if len(events) < EVENTS:
            time.sleep(FOLLOW_S)
        events = _more(client, 0 if last is None else last["number"] - 1)


def _more(client: AdminClient, after: int) -> list[dict[str, Any]]:
    """Asked for until the service answers."""
    while True:
        try:
            events: list[dict[str, Any]] = client.get("/admin/events", {"after": after, "limit": EVENTS})["events"]
        except NotAnswered:
            time.sleep(FOLLOW_S)
            continue
        return events


def _same(event: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(event[name] == other[name] for name in ("number", "kind", "fields"))


def _event_line(event: dict[str, Any]) -> str:
    fields = (f"{name}={_value(value)}" for name, value in event["fields"].items())
    return "  ".join((event["at"], event["kind"], " ".join(fields))).rstrip()


def _value(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(letter.isspace() for letter in text) else text
