"""Waits for the end of a change, and shows how far it is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from services.admin_client import AdminClient, NotAnswered, NotFound
from services.state import ServiceRecord
from services.waiting import Deadline

PHASES = ("plan", "prepare", "commit", "retire")
POLL_S = 20.0
GRACE_S = 5.0  # for an answer to arrive, after the service has waited
RETRY_S = 0.5
# Of a change, from its beginning to its end; where they differ, a controller died before it had saved the id as taken
GIVEN = ("kind", "joining", "leaving", "replicas", "extra")

Document = dict[str, Any]
Show = Callable[[Document], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last that was seen of a change; `failure` says why it is not done."""

    change: Document
    failure: str | None = None
    known: bool = True  # False: the service knows no such change any more
    note: str | None = None  # on one that is done, though nobody saw its end


def follow(client: AdminClient, change: Document, deadline: Deadline, show: Show) -> Outcome:
    """Watch a change until it is over. What hinders the service from answering is ridden out until the time is up.

    Raises CommandError when the service refuses to tell.
    """
    hindrance: NotAnswered | None = None
    show(change)
    while not change["over"]:
        left_s = deadline.left_s
        if left_s <= 0:
            return Outcome(change, _late(client, change, deadline, hindrance))
        wait_s = min(POLL_S, left_s)
        path = f"/admin/changes/{change['id']}"
        try:
            found = client.get(path, {"seen": change["version"], "timeout_s": wait_s}, wait_s + GRACE_S)
        except NotFound:
            return _unknown(client, change)
        except NotAnswered as error:
            if client.record.ended:
                return Outcome(change, f"the service has ended, and {change['id']} with it: {error}")
            hindrance = error
            time.sleep(min(RETRY_S, wait_s))
            continue
        if any(found[name] != change[name] for name in GIVEN):
            return _unknown(client, change)
        change, hindrance = found, None
        show(change)
    if change["phase"] == "done":
        return Outcome(change)
    return Outcome(change, f"{change['id']} was rolled back: {change['reason'] or 'no reason was given'}")


def forgotten(change: Document) -> str:
    """How it is said that the service does not know a change any more."""
    return f"{change['id']} ({change['kind']}) is not known any more, as after a restart of the controller"


def _unknown(client: AdminClient, change: Document) -> Outcome:
    shows = f"`{to_type('status', client.record)}` shows what holds"
    return Outcome(change, f"{forgotten(change)}; {shows}", known=False)


def _late(client: AdminClient, change: Document, deadline: Deadline, hindrance: NotAnswered | None) -> str:
    """That the time is up, and what is known of the change; nothing goes on for sure where no answer came."""
    where = f"in phase '{change['phase']}'"
    if hindrance is None:
        late = f"{change['id']} is not over after {deadline.timeout_s:g} s, {where}; it goes on"
    else:
        late = f"{change['id']} was {where} when it was last seen, and after {deadline.timeout_s:g} s: {hindrance}"
    return f"{late}; `{to_type('status', client.record)}` shows it"


def to_type(action: str, record: ServiceRecord) -> str:
    """The command for the same service."""
    return f"shoal experts {action}{record.options}"


@contextmanager
def shown(console: Console, lines: bool) -> Iterator[Show]:
    """How a change is shown: by a bar on a terminal, else by a line a step, or, without `lines`, not at all."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task("", total=None)

            def draw(change: Document) -> None:
                total = (
                    None if change["phase"] == "plan" else change["pairs"]
                )  # not known yet: the bar moves to and fro
                bars.update(task, description=_trail(change), completed=change["pairs_loaded"], total=total)

            yield draw
    else:
        written, quarter = 0, 0

        def write_new(change: Document) -> None:
            nonlocal written, quarter
            steps = _steps(change)
            new, written = steps[written:], max(written, len(steps))
            if change["phase"] == "prepare" and quarter < (
                now := 4 * change["pairs_loaded"] // max(change["pairs"], 1)
            ):
                new, quarter = [*new, f"prepare: {_loaded(change)}"], now
            for step in new:
                console.print(step, markup=False, highlight=False, soft_wrap=True)

        yield write_new if lines else lambda change: None


def summary(change: Document) -> str:
    """One line on a change: what it is, where it stands, what it took."""
    words = [change["id"], f"({change['kind']})", change["phase"].replace("_", " ")]
    if change["epoch"] is not None:
        words.append(f"at epoch {change['epoch']}")
    words.append(f"after {sum(change['seconds'].values()):.1f} s" if change["over"] else f"with {_loaded(change)}")
    if change["why"]:
        words.append(f"because of {change['why']}")
    return " ".join(words) + (f": {change['reason']}" if change["reason"] else "")


def _reached(change: Document) -> int:
    """How many phases have begun; of a change that was rolled back, at least one."""
    if change["phase"] in PHASES:
        return PHASES.index(change["phase"]) + 1
    return len(PHASES) if change["phase"] == "done" else 1


def _trail(change: Document) -> str:
    reached = _reached(change)
    if change["phase"] == "done":
        styles = ["green"] * len(PHASES)
    else:
        styles = ["green"] * (reached - 1) + ["bold"] + ["dim"] * (len(PHASES) - reached)
    return " → ".join(f"[{style}]{phase}[/{style}]" for style, phase in zip(styles, PHASES, strict=True))


def _steps(change: Document) -> list[str]:
    """A line for each phase that has begun."""
    said = {
        "plan": ", ".join(
            [f"{host_id} joins" for host_id in change["joining"]]
            + [f"{host_id} leaves" for host_id in change["leaving"]]
        ),
        "prepare": f"{change['pairs']} expert copies to load",
    }
    return [f"{phase}: {said[phase]}" if said.get(phase) else phase for phase in PHASES[: _reached(change)]]


def _loaded(change: Document) -> str:
    return f"{change['pairs_loaded']} of {change['pairs']} expert copies loaded"
