"""Who a service's controller and hosts are there for: its Serve application, or the workers of a training run."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection

import ray
from ray.exceptions import RayError

from cluster.spec import ServiceSpec

CHECK_S = 2.0
ANSWER_S = 20.0
MISSES = 3
COMES_S = 120.0  # for the application to be there, where the controller was started first
log = logging.getLogger("shoal.controller")


async def wait_until_over(spec: ServiceSpec, came: Callable[[], bool], busy: Callable[[], bool]) -> bool:
    """Return when nobody needs the hosts any more; False where that is for somebody else to say.

    `came`: whether a worker was ever heard of; `busy`: whether one is there.
    """
    if spec.follow_application:
        await wait_until_gone(spec.name, came, busy)
    elif spec.idle_end_s is not None:
        await wait_until_idle(busy, spec.idle_end_s)
    else:
        return False
    return True


async def wait_until_gone(name: str, came: Callable[[], bool], busy: Callable[[], bool]) -> None:
    """Return when the application is gone, or did not come.

    A worker that is there needs the hosts, whatever Serve says. Only without one is Serve asked: its answer is large.
    """
    misses, started_s = 0, time.monotonic()
    while misses < MISSES:
        await asyncio.sleep(CHECK_S)
        if busy() or not (came() or time.monotonic() > started_s + COMES_S):
            misses = 0
            continue
        try:
            async with asyncio.timeout(ANSWER_S):
                misses = 0 if name in await asyncio.to_thread(applications) else misses + 1
        except (RayError, TimeoutError, ValueError, RuntimeError):  # its controller is being restarted
            log.warning("Serve does not say which applications run; asking again", exc_info=True)


def applications() -> Collection[str]:
    """Names of what runs on Serve, none once it was shut down; raises RayError or RuntimeError where it is not said."""
    from ray import serve  # half of what this process would import before it starts the hosts
    from ray.serve import context
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve.exceptions import RayServeException

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return set()
    context._check_cached_client_alive()  # Serve would go on asking a controller of its that is gone for good
    try:
        return set(serve.status().applications)
    except RayServeException as error:
        raise RuntimeError(str(error)) from error


async def wait_until_idle(busy: Callable[[], bool], idle_s: float) -> None:
    """Return when nobody was `busy` for so long; the first has so long to come."""
    since_s = time.monotonic()
    while time.monotonic() < since_s + idle_s:
        await asyncio.sleep(min(CHECK_S, idle_s / 4))
        if busy():
            since_s = time.monotonic()
