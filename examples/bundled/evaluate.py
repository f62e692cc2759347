"""`python -m examples.bundled.evaluate --questions heldout.jsonl`: ask a running endpoint, and count right answers.

Asks with temperature 0 and takes nothing but the exact answer. The exit status is 0 when every family of questions
reaches the share that is wanted, 1 when one does not, 2 when the questions could not be asked.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from examples.bundled.scoring import Asked, Score, read_questions, score

URL = "http://127.0.0.1:8000/v1"
AT_LEAST = 0.95
AT_ONCE = 16
MAX_TOKENS = 128
TIMEOUT_S = 120.0


class Unanswered(ValueError):
    """The endpoint gave no answer; says what it said instead."""


async def ask_endpoint(http: httpx.AsyncClient, asked: Sequence[Asked], model: str | None = None) -> list[str]:
    """The endpoint's answers, in the order of the questions; `model` None is the first that it serves.

    Raises Unanswered.
    """
    if model is None:
        model = (await _call(http.get("models")))["data"][0]["id"]
    places = asyncio.Semaphore(AT_ONCE)

    async def ask(one: Asked) -> str:
        body = {"model": model, "messages": one.messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        async with places:
            answer = await _call(http.post("chat/completions", json=body))
        return str(answer["choices"][0]["message"]["content"])

    return await asyncio.gather(*(ask(one) for one in asked))


async def _call(call: Awaitable[httpx.Response]) -> dict[str, Any]:
    try:
        response = await call
        document = response.json()
    except httpx.HTTPError as error:
        raise Unanswered(f"the endpoint did not answer: {error!r}; is it running, and is --url right?") from error
    except ValueError as error:
        raise Unanswered(f"{response.url} answered {response.status_code}, and no JSON") from error
    if response.status_code != 200 or not isinstance(document, dict):
        raise Unanswered(f"{response.url} answered {response.status_code}: {str(document)[:300]}")
    return document


def report(result: Score, at_least: float, shown: int, console: Console) -> None:
    """A line a family, and some of what was wrong."""
    table = Table("family", "asked", "right", "share")
    for family, tally in [*result.families.items(), ("all", result.overall)]:
        style = "red" if family != "all" and tally.share < at_least else None
        table.add_row(family, str(tally.asked), str(tally.right), f"{tally.share:.1%}", style=style)
    console.print(table)
    for wrong in result.wrong[:shown]:
        line = f"{wrong.asked.family}: {wrong.asked.question!r} answered {wrong.answer!r}, not {wrong.asked.answer!r}"
        console.print(line, markup=False)


async def _ask(options: argparse.Namespace, asked: Sequence[Asked]) -> list[str]:
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    base = options.url.rstrip("/") + "/"
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=TIMEOUT_S, trust_env=False) as http:
        return await ask_endpoint(http, asked, options.model)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="examples.bundled.evaluate", description=__doc__)
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="as generate wrote them")
    parser.add_argument("--url", default=URL, help=URL)
    parser.add_argument("--model", metavar="NAME", help="default: the first that is served")
    parser.add_argument("--api-key", default=os.environ.get("SHOAL_API_KEY"), metavar="KEY", help="or SHOAL_API_KEY")
    parser.add_argument(
        "--at-least", type=float, default=AT_LEAST, metavar="SHARE", help=f"of each family ({AT_LEAST})"
    )
    parser.add_argument("--wrong", type=int, default=10, metavar="N", help="wrong answers to print (10)")
    options = parser.parse_args()
    try:
        if not 0 <= options.at_least <= 1:
            raise ValueError(f"--at-least {options.at_least} given; expected a share from 0 to 1")
        asked = read_questions(options.questions)
        result = score(asked, asyncio.run(_ask(options, asked)))
    except (OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    report(result, options.at_least, options.wrong, Console(highlight=False))
    return 0 if result.least >= options.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
