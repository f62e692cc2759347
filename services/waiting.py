"""Waits for a service that restarts until it answers, and not for one that has ended."""

import time
from collections.abc import Callable
from typing import Any

import httpx

from services.admin_client import ANSWER_S, AdminClient, NotAnswered, NotNow, NotReady
from services.commands import CommandError, NoService
from services.state import ServiceRecord

POLL_S = 0.5
GONE_S = 10.0  # without an answer, after which a service where nothing listens has ended


class TimeUp(CommandError):
    """There was no answer in time; says what hindered the last one."""


class Deadline:
    """`timeout_s` seconds from when it was made."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()


def until_answered(
    client: AdminClient,
    question: Callable[[], dict[str, Any]],
    deadline: Deadline,
    say: Callable[[str], None] = lambda hindrance: None,
    for_now: type[NotNow] = NotReady,
) -> dict[str, Any]:
    """The answer to a question, put again while no answer comes or it is refused `for_now`; `say` hears why.

    Raises TimeUp at the deadline, NoService when the service has ended, and at once whatever else the question raises.
    """
    silent_since_s: float | None = None
    said = None
    while True:
        try:
            return question()
        except NotAnswered as error:
            now_s = time.monotonic()
            silent_since_s = now_s if silent_since_s is None else silent_since_s
            hindrance = str(error)
            if client.record.ended:
                raise NoService(f"{client.record.url} has ended: {hindrance}") from error
            if now_s >= silent_since_s + GONE_S and not listens(client.record):
                raise NoService(f"nothing listens at {client.record.url} any more: {hindrance}") from error
        except for_now as error:
            silent_since_s, hindrance = None, str(error)
        left_s = deadline.left_s
        if left_s <= 0:
            raise TimeUp(hindrance)
        if hindrance != said:
            say(hindrance)
            said = hindrance
        time.sleep(min(POLL_S, left_s))


def listens(record: ServiceRecord) -> bool:
    """Whether anything answers there at all, whatever it says."""
    try:
        httpx.get(f"{record.url}/health", timeout=ANSWER_S, trust_env=False)
    except httpx.HTTPError:
        return False
    return True
