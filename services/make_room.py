"""`shoal experts drain --to N` and `--node NODE`: before nodes go, their hosts' experts move elsewhere."""

import argparse
import json
import time
from typing import Any

import httpx
from rich.console import Console

from services.admin_client import ANSWER_S, AdminClient, NotAnswered, NotNow
from services.commands import CommandError, NoService
from services.follow_change import follow, shown, summary
from services.state import ServiceRecord

POLL_S = 0.5
NOT_YET: dict[str, Any] = {"done": False, "change": None}
GONE_S = 10.0  # without an answer, after which a service that answered before has ended


def make_room(record: ServiceRecord, options: argparse.Namespace) -> int:
    """Ask, and with --wait ask again until it is done.

    Raises NoService when the service has ended meanwhile, CommandError when this is refused, undone or late.
    """
    console = Console(stderr=options.json, highlight=False)
    client = AdminClient(record)
    answer = _wait(client, options, console) if options.wait else _ask(client, options)
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        console.print("done" if answer["done"] else _under_way(answer), markup=False, soft_wrap=True)
    return 0


def _ask(client: AdminClient, options: argparse.Namespace) -> dict[str, Any]:
    body = {"hosts": options.to} if options.node is None else {"node": options.node}
    return client.post("/admin/experts/room", body)


def _wait(client: AdminClient, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The answer that it is done. A service that is not ready is waited for, and changes that were under way before.

    A change that a new controller does not know any more is begun again.
    """
    deadline_s = time.monotonic() + options.timeout
    silent_since_s: float | None = None
    while True:
        try:
            answer = _ask(client, options)
        except NotAnswered as error:
            now_s = time.monotonic()
            silent_since_s = now_s if silent_since_s is None else silent_since_s
            if now_s >= silent_since_s + GONE_S and not listens(client.record):
                raise NoService(f"{client.record.url} has ended: {error}") from error
            answer = NOT_YET
        except NotNow:
            answer, silent_since_s = NOT_YET, None
        else:
            silent_since_s = None
        if answer["done"]:
            return answer
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise CommandError(f"not done after {options.timeout:g} s; it goes on: ask again to wait longer")
        if answer["change"] is None:
            time.sleep(min(POLL_S, left_s))
            continue
        with shown(console, lines=not options.json) as show:
            outcome = follow(client, answer["change"], left_s, show)
        if outcome.failure is not None and (outcome.change["over"] or time.monotonic() >= deadline_s):
            raise CommandError(outcome.failure)
        if outcome.failure is None and not options.json:
            console.print(summary(outcome.change), markup=False, soft_wrap=True)


def listens(record: ServiceRecord) -> bool:
    """Whether anything answers there at all, whatever it says."""
    try:
        httpx.get(f"{record.url}/health", timeout=ANSWER_S, trust_env=False)
    except httpx.HTTPError:
        return False
    return True


def _under_way(answer: dict[str, Any]) -> str:
    change = answer["change"]
    return summary(change) if change is not None else "it will begin; --wait shows it through"
