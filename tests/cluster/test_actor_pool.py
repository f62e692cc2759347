"""Stand-bys come and go, and none that has gone is taken for a life."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnschedulableError, NodeDiedError, RayActorError, RayTaskError

from cluster import actor_pool
from cluster.actor_pool import REST_S, ActorPool
from cluster.nodes import Node
from cluster.pool import Process
from cluster.spec import ServiceSpec

ENDS = [
    ActorUnschedulableError("The node specified via NodeAffinitySchedulingStrategy doesn't exist any more"),
    NodeDiedError("its node died"),
    RayActorError(error_msg="it died"),
    RayTaskError("warm", "traceback", ValueError("no such file"), "actor", 1, "ip"),
]
SPEC = ServiceSpec("s", "m", node_resource="shoal_expert")


class World:
    """A pool whose processes are warm, or end, when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.nodes = [Node("a", frozenset(("a",)), 4.0)]
        self.pool = ActorPool(SPEC, "token", lambda: self.nodes, lambda: None)
        monkeypatch.setattr(self.pool, "_make", self._make)
        clock: Any = SimpleNamespace(monotonic=lambda: self.now_s)
        monkeypatch.setattr(actor_pool, "time", clock)

    def _make(self, threads: int, node: str | None) -> Process:
        loop = asyncio.get_running_loop()
        warm, end = loop.create_future(), loop.create_future()
        actor = SimpleNamespace(
            warm=SimpleNamespace(remote=lambda: warm, answer=warm),
            wait_for_end=SimpleNamespace(remote=lambda: end, answer=end),
        )
        name = f"expert:{node}:{self.now_s}"
        process = self.pool._known[name] = Process(name, actor, node)
        return process

    async def standby(self) -> Process:
        """The one that waits after a while of quiet."""
        self.now_s += REST_S
        self.pool.keep_standby(lambda: 1)
        await asyncio.sleep(0)
        (process,) = self.pool._waiting
        return process


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_a_standby_that_ends_is_forgotten_and_another_is_made(
    monkeypatch: pytest.MonkeyPatch, end: Exception, warm: bool
) -> None:
    async def scene() -> None:
        lost: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: lost.append(context))
        world = World(monkeypatch)
        first = await world.standby()
        if warm:
            first.actor.warm.answer.set_result(7)
            await asyncio.sleep(0.001)
            assert world.pool.standby == [7]
        (first.actor.wait_for_end if warm else first.actor.warm).answer.set_exception(end)
        await asyncio.sleep(0.001)
        assert world.pool._tasks == set()
        assert lost == []
        assert world.pool.names == ()
        assert world.pool.take(1) is not first
        second = await world.standby()
        second.actor.warm.answer.set_result(8)
        await asyncio.sleep(0.001)
        assert world.pool.standby == [8]
        assert world.pool.take(1) is second

    asyncio.run(scene())


def test_a_standby_that_became_a_life_is_no_longer_its_pools_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        world = World(monkeypatch)
        process = await world.standby()
        process.actor.warm.answer.set_result(7)
        await asyncio.sleep(0.001)
        assert world.pool.take(1) is process
        process.actor.wait_for_end.answer.set_exception(ENDS[0])
        await asyncio.sleep(0.001)
        assert world.pool.names == (process.name,)  # whoever leads the life ends it

    asyncio.run(scene())
