"""`shoal experts drain --to N` and `--node NODE`: before nodes go, their hosts' experts move elsewhere."""

import argparse
import json
import time
from typing import Any

from rich.console import Console

from services.admin_client import AdminClient, NotNow
from services.commands import CommandError
from services.follow_change import follow, shown, summary
from services.state import ServiceRecord
from services.waiting import Deadline, TimeUp, until_answered

POLL_S = 0.5


def make_room(record: ServiceRecord, options: argparse.Namespace) -> int:
    """Ask, and with --wait ask again until it is done.

    Raises NoService when the service has ended meanwhile, CommandError when this is refused, undone or late.
    """
    console = Console(stderr=options.json, highlight=False, markup=False, emoji=False)
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
    deadline = Deadline(options.timeout)
    while True:
        try:
            answer = until_answered(client, lambda: _ask(client, options), deadline, for_now=NotNow)
        except TimeUp as late:
            raise CommandError(f"not done after {options.timeout:g} s: {late}") from late
        if answer["done"]:
            return answer
        left_s = deadline.left_s
        if left_s <= 0:
            raise CommandError(f"not done after {options.timeout:g} s; it goes on: ask again to wait longer")
        if answer["change"] is None:
            time.sleep(min(POLL_S, left_s))
            continue
        with shown(console, lines=not options.json) as show:
            outcome = follow(client, answer["change"], deadline, show)
        if outcome.failure is not None and (outcome.change["over"] or deadline.left_s <= 0):
            raise CommandError(outcome.failure)
        if outcome.failure is None and not options.json:
            console.print(summary(outcome.change), markup=False, soft_wrap=True)


def _under_way(answer: dict[str, Any]) -> str:
    change = answer["change"]
    return summary(change) if change is not None else "it will begin; --wait shows it through"
