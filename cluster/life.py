"""One life of a host as its controller sees it: an actor that is asked, and how long one waits for its word."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError

from cluster.pool import Process
from cluster.resident import HostInfo
from cluster.threads import Share

ADOPT_TIMEOUTS_S = (5.0, 20.0)  # for a life that does not even answer a ping, and for one that does
PROBE_TIMEOUTS_S = (0.5, 0.9)  # the shortest and the longest
log = logging.getLogger("shoal.fleet")


@dataclass(slots=True, eq=False)
class Life:
    """A host's running life: its actor, and what is known of it."""

    host_id: str
    generation: int
    process: Process
    share: Share | None = None  # of its node's cores, that it has or is being told of
    info: HostInfo | None = None
    progress: tuple[int, int] = (0, 1)
    taking: str | None = None  # the change that it loads for
    telling: bool = False  # it of its share

    @property
    def actor(self) -> Any:
        return self.process.actor

    async def tell_share(self) -> None:
        """Have it keep to `share`, and to what that becomes meanwhile: one call at a time, as its methods run beside
        one another, and the last must win.
        """
        if self.telling:
            return
        self.telling, told = True, None
        try:
            while told != self.share:
                told = self.share
                await self.actor.share.remote(told)
        except RayTaskError as error:
            log.warning("%s does not take its share of the cores: %s", self.host_id, reason_of(error))
        except RayError:
            pass  # it has ended, and whoever waits for that is told
        finally:
            self.telling = False

    async def answers(self) -> bool:
        """Whether it answers a ping: a suspect has as long as another life would take to load, within bounds."""
        shortest_s, longest_s = PROBE_TIMEOUTS_S
        patience_s = min(longest_s, max(shortest_s, self.info.load_s if self.info is not None else longest_s))
        try:
            await asyncio.wait_for(self.actor.ping.remote(), patience_s)
        except RayTaskError as error:
            log.warning("%s answers that it cannot answer: %s", self.host_id, reason_of(error))
        except (TimeoutError, RayError):
            return False
        return True


async def settled(actor: Any) -> HostInfo:
    """What a life is once it has ended what an earlier controller began; raises RayError, and TimeoutError.

    It may have to wait for an expert that is on its way from a host that stands still, and serves meanwhile.
    """
    at_once_s, longest_s = ADOPT_TIMEOUTS_S
    async with asyncio.timeout(longest_s):
        settling: asyncio.Future[HostInfo] = asyncio.ensure_future(actor.settle.remote())
        try:
            return await asyncio.wait_for(asyncio.shield(settling), at_once_s)
        except TimeoutError:
            await asyncio.wait_for(actor.ping.remote(), PROBE_TIMEOUTS_S[1])
            return await settling
        finally:
            settling.cancel()


def reason_of(error: RayError) -> str:
    """One line that says why an actor's method, or the actor, failed."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return str(error.cause).splitlines()[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
