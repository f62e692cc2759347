"""What became of a change that the service does not know any more.

A controller that is restarted knows what was committed, hosts and replicas, and nothing of the changes themselves
(`cluster/saved.py`). So whether one was committed shows, if at all, in what holds now.
"""

from collections.abc import Callable
from typing import Any

from services.admin_client import AdminClient, NotReady
from services.commands import NoService
from services.follow_change import Document, Outcome, forgotten, to_type
from services.waiting import Deadline, TimeUp, until_answered


def find_out(client: AdminClient, change: Document, deadline: Deadline, say: Callable[[str], None]) -> Outcome:
    """Whether a change holds that was followed until it was forgotten; a service that restarts is waited for.

    Raises CommandError when the service refuses to tell.
    """
    try:
        report = until_answered(client, lambda: _report(client), deadline, say)
    except (TimeUp, NoService) as unknown:
        shows = f"`{to_type('status', client.record)}` shows what holds, once it answers"
        return Outcome(change, f"{forgotten(change)}: {unknown}; {shows}")
    return judge(change, report, to_type("status", client.record))


def judge(change: Document, report: Document, check: str) -> Outcome:
    """By what was last seen of the change, and what the service reports now; `check` is the command that shows it."""
    lost = forgotten(change)
    if report["state"] == "failed":
        return Outcome(change, f"{lost}, and the service cannot start: {report['reason']}")
    if change["phase"] == "retire":
        return _committed(change, report, lost)
    if not change["joining"] and not change["leaving"] and change["kind"] != "replicas":
        return Outcome(
            change,
            f"{lost}, and whether it was committed cannot be told: it changes neither hosts nor replicas. "
            f"`{check}` shows the load; asking again does no harm",
        )
    holds, lacks = _compared(change, report)
    if lacks:
        return Outcome(change, f"{lost}, and what it asked for does not hold: {', '.join(lacks)}; ask again")
    return Outcome(change, note=f"{lost}; what it asked for holds: {', '.join(holds)}")


def _report(client: AdminClient) -> Document:
    """What the service says of its hosts, once it has a table of them; raises NotReady before."""
    report: dict[str, Any] = client.get("/admin/experts")
    if report["state"] != "failed" and not report["epoch"]:
        raise NotReady(f"the service is {report['state']}, and does not tell yet which hosts it has")
    return report


def _committed(change: Document, report: Document, lost: str) -> Outcome:
    """What is committed was saved before anybody heard of it, and epochs only rise while a service lasts."""
    if change["epoch"] is not None and report["epoch"] < change["epoch"]:
        epochs = f"it was committed at epoch {change['epoch']}, and the service is at epoch {report['epoch']}"
        return Outcome(change, f"{lost}: {epochs}, for it was started anew")
    at = "" if change["epoch"] is None else f" at epoch {change['epoch']}"
    return Outcome(change, note=f"{lost}; it was committed{at}, and a restart goes on from there")


def _compared(change: Document, report: Document) -> tuple[list[str], list[str]]:
    """What holds of that which was asked for, and what does not, in words."""
    members = report["members"]
    claims = [(f"{host} has joined", f"{host} has not joined", host in members) for host in change["joining"]]
    claims += [(f"{host} has left", f"{host} has not left", host not in members) for host in change["leaving"]]
    if change["kind"] == "replicas":
        for name in ("replicas", "extra"):
            right = f"{name} {report[name]}"
            claims.append((right, f"{right} instead of {change[name]}", report[name] == change[name]))
    return [yes for yes, _, true in claims if true], [no for _, no, true in claims if not true]
