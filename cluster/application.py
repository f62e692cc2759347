"""Who a service's controller and hosts are there for: its Serve application, or the workers of a training run."""

import asyncio
import logging
import time
from collections.abc import Callable

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.spec import ServiceSpec

CHECK_S = 2.0
ANSWER_S = 20.0
MISSES = 3
COMES_S = 120.0  # for the application to be there, where the controller was started first
log = logging.getLogger("shoal.controller")


async def wait_until_over(spec: ServiceSpec, came: Callable[[], bool], busy: Callable[[], bool]) -> bool:
    """Return when nobody needs the hosts any more; False where that is for somebody else to say.

    `came`: whether the application was heard of; `busy`: whether a worker is there.
    """
    if spec.follow_application:
        await wait_until_gone(spec.name, came)
    elif spec.idle_end_s is not None:
        await wait_until_idle(busy, spec.idle_end_s)
    else:
        return False
    return True


async def wait_until_gone(name: str, came: Callable[[], bool]) -> None:
    """Return when the application is gone, or did not come.

    `came` knows better than Serve that it was there: an application may be deleted before it was once seen here.
    """
    misses, started_s, seen = 0, time.monotonic(), False
    while misses < MISSES:
        await asyncio.sleep(CHECK_S)
        try:
            async with asyncio.timeout(ANSWER_S):
                present = name in (await asyncio.to_thread(serve.status)).applications
        except (RayError, RayServeException, TimeoutError, ValueError, RuntimeError):
            log.warning("Serve does not say which applications run; asking again", exc_info=True)
            continue  # its controller is being restarted
        seen = seen or present
        if seen or came() or time.monotonic() > started_s + COMES_S:
            misses = 0 if present else misses + 1


async def wait_until_idle(busy: Callable[[], bool], idle_s: float) -> None:
    """Return when nobody was `busy` for so long; the first has so long to come."""
    since_s = time.monotonic()
    while time.monotonic() < since_s + idle_s:
        await asyncio.sleep(min(CHECK_S, idle_s / 4))
        if busy():
            since_s = time.monotonic()
