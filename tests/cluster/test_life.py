"""A life is told its share of the cores by one call at a time, and what it was told last is what it shall have."""

import asyncio
from types import SimpleNamespace

from ray.exceptions import RayActorError, RayTaskError

from cluster.life import Life
from cluster.pool import Process
from cluster.threads import Share

FIRST, SECOND, THIRD = (Share(1, 0, places) for places in (1, 2, 3))


class Slow:
    """An actor whose `share` takes until it is let go; its methods run beside one another."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[Share] = []
        self.under_way = self.most = 0
        self.let_go = asyncio.Event()
        self._error = error
        self.share = SimpleNamespace(remote=self._share)

    async def _share(self, share: Share) -> None:
        self.told.append(share)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await self.let_go.wait()
        self.under_way -= 1
        if self._error is not None:
            raise self._error


def told(actor: Slow) -> tuple[list[Share], int]:
    """Of three shares in a row, two of which come while the first is told: what was told, and how much at once."""

    async def tell() -> None:
        life = Life("host-0", 1, Process("expert:0", actor))
        calls = []
        for share in (FIRST, SECOND, THIRD):
            life.share = share
            calls.append(asyncio.create_task(life.tell_share()))
            await asyncio.sleep(0)
        actor.let_go.set()
        await asyncio.gather(*calls)
        life.share = FIRST
        await life.tell_share()

    asyncio.run(tell())
    return actor.told, actor.most


def test_the_last_share_is_told_last_and_none_beside_another() -> None:
    assert told(Slow()) == ([FIRST, THIRD, FIRST], 1)


def test_a_life_that_has_ended_or_refuses_is_told_again_the_next_time() -> None:
    refusal = RayTaskError("share", "a traceback", OSError("no such core"))
    for error in (RayActorError(error_msg="it died"), refusal):
        assert told(Slow(error)) == ([FIRST, FIRST], 1)
