"""A training run's controller ends itself once nobody trains any more."""

import asyncio
import itertools
import time

from cluster.application import wait_until_idle


def test_it_waits_as_long_as_somebody_is_there_and_a_while_longer() -> None:
    looks = itertools.chain([False, True, True], itertools.repeat(False))
    started_s = time.monotonic()
    asyncio.run(wait_until_idle(lambda: next(looks), 0.2))
    assert time.monotonic() - started_s >= 0.05 * 3 + 0.15
