"""Seats in a service's hosts: apart while that can be, found again, given up, and never the end of the host itself."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster import lodging
from cluster.lodging import LodgingPool
from cluster.pool import Process
from cluster.resident import HostInfo
from cluster.roster import HostReport
from cluster.spec import CONTROLLER_NAME, ServiceSpec

SPEC = ServiceSpec("run", "m", trains=True, lodges_with="p8000")
TICK_S = 0.01
FROZEN: Any = object()  # never answers


class Method:
    """As of an actor's handle."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, concurrency_group: str) -> "Method":
        assert concurrency_group == "guests"
        return self

    def remote(self, *arguments: Any) -> Awaitable[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            found = self._call(*arguments)
            if found is not FROZEN:
                answer.set_result(found)
        except RayActorError as error:
            answer.set_exception(error)
            answer.exception()  # whoever does not wait for it is told of nothing, as by Ray
        return answer


class Host:
    """An expert actor of the service."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.full = self.dead = self.frozen = False
        self.calls: list[tuple[Any, ...]] = []
        self.admit = Method(self._admit)
        self.guest = Method(self._guest)
        self.evict = Method(self._evict)

    def _admit(self, spec: ServiceSpec, name: str, token: str) -> bool:
        self._live()
        if self.frozen:
            return FROZEN
        assert (spec, token) == (SPEC, "token")
        if not self.full:
            self.inside.append(name)
        return not self.full

    def _guest(self, *call: Any) -> str:
        self._live()
        self.calls.append(call)
        return f"answer to {call[1]}"

    def _evict(self, name: str) -> None:
        self._live()
        if not self.frozen and name in self.inside:
            self.inside.remove(name)

    def _live(self) -> None:
        if self.dead:
            raise RayActorError(error_msg="it died")


class World:
    """The service's actors, as Ray would find them, and a pool of a run."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = {name: Host() for name in hosts}
        self.serving = list(hosts)
        self.there = True  # the service's controller
        self.saved: list[tuple[str, ...]] = []
        self.given_up: list[str] = []
        self.residents = Method(lambda: {name: (f"host-{name[-1]}", 7) for name in self.serving})
        self.reported: list[tuple[str, int]] = []
        self.report = Method(lambda host_id, generation, reason: self.reported.append((host_id, generation)))
        self.pool = self.new_pool()

    def new_pool(self) -> LodgingPool:
        return LodgingPool(SPEC, "p8000", "token", lambda: self.saved.append(self.pool.names), self.given_up.append)

    def get_actor(self, name: str, namespace: str) -> Any:
        assert namespace == "shoal-p8000"
        if name == CONTROLLER_NAME and self.there:
            return self
        if name in self.hosts:
            return self.hosts[name]
        raise ValueError(name)

    async def begin(self) -> Process:
        process = self.pool.take(1)
        assert await process.actor.begin.remote("host-0", 1) == "answer to begin"
        return process

    @property
    def crowd(self) -> list[int]:
        return [len(host.inside) for host in self.hosts.values()]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[World, Coroutine[Any, Any, None]], None]:
    """`play(world, scene)`, at a hundredth of the usual waits."""
    for name in ("LOOK_S", "ANSWER_S", "APART_S", "ROOM_S", "GONE_S"):
        monkeypatch.setattr(lodging, name, getattr(lodging, name) / 100)

    def run(world: World, scene: Coroutine[Any, Any, None]) -> None:
        monkeypatch.setattr(lodging.ray, "get_actor", world.get_actor)
        asyncio.run(asyncio.wait_for(scene, 20))

    return run


Play = Callable[[World, Coroutine[Any, Any, None]], None]


def test_guests_live_apart_and_calls_reach_them_by_name(play: Play) -> None:
    world = World("expert:a", "expert:b")

    async def scene() -> None:
        first, second = await asyncio.gather(world.begin(), world.begin())
        assert world.crowd == [1, 1]
        assert {first.name.partition("@")[2], second.name.partition("@")[2]} == {"expert:a", "expert:b"}
        assert set(world.pool.names) == {first.name, second.name}
        assert set(world.saved[-1]) == set(world.pool.names)  # before either was admitted, or after the first
        host = world.hosts[first.name.partition("@")[2]]
        assert await first.actor.ping.remote() == "answer to ping"
        assert host.calls == [(first.name, "begin", "host-0", 1), (first.name, "ping")]

    play(world, scene())


def test_a_name_is_saved_before_the_guest_is_in(play: Play) -> None:
    world = World("expert:a")
    inside: list[int] = []

    async def scene() -> None:
        world.pool._remember = lambda: inside.append(len(world.hosts["expert:a"].inside))
        await world.begin()
        assert inside == [0]

    play(world, scene())


def test_a_lost_host_is_waited_for_and_then_done_without(play: Play) -> None:
    world = World("expert:a", "expert:b")

    async def scene() -> None:
        processes = [await world.begin(), await world.begin()]
        world.serving.remove("expert:a")
        world.hosts["expert:a"].dead = True
        with pytest.raises(RayActorError, match="it died"):
            await processes[0].actor.wait_for_end.remote()
        world.pool.end(processes[0])  # who is dead cannot be evicted, which is fine
        coming = asyncio.create_task(world.begin())
        await asyncio.sleep(3 * TICK_S)
        assert not coming.done()
        world.hosts["expert:c"] = Host()
        world.serving.append("expert:c")
        await coming
        assert [len(world.hosts[name].inside) for name in ("expert:b", "expert:c")] == [1, 1]
        world.serving.remove("expert:c")
        world.pool.end(await world.begin())  # nobody came: two of them share a host for now
        assert world.crowd[1] == 1

    play(world, scene())


def test_a_full_host_and_one_that_dies_are_passed_over(play: Play) -> None:
    world = World("expert:a", "expert:b", "expert:c")
    world.hosts["expert:a"].full = world.hosts["expert:b"].dead = True

    async def scene() -> None:
        await world.begin()
        assert world.crowd == [0, 0, 1]

    play(world, scene())


def test_a_frozen_host_is_told_to_its_service(play: Play) -> None:
    world = World("expert:a", "expert:b")

    async def scene() -> None:
        first = await world.begin()
        world.hosts["expert:a"].frozen = world.hosts["expert:b"].frozen = True
        info = HostInfo(HostReport("host-0", 1, "", frozenset()), pid=1, node="n", nbytes=0, stamps={}, load_s=0.0)
        await world.pool.insist(first, info)
        assert world.reported == [("host-a", 7)]
        world.pool.end(first)
        coming = asyncio.create_task(world.begin())
        while len(world.reported) < 2:
            await asyncio.sleep(TICK_S)
        world.hosts["expert:b"].frozen = False
        await coming
        assert world.crowd == [1, 1]  # the frozen one's will be evicted when it goes on

    play(world, scene())


def test_the_next_controller_finds_its_guests_and_forgets_those_of_dead_hosts(play: Play) -> None:
    world = World("expert:a")

    async def scene() -> None:
        process = await world.begin()
        world.pool = world.new_pool()
        found = world.pool.find(process.name)
        assert found is not None
        assert world.pool.names == (process.name,)
        assert await found.actor.settle.remote() == "answer to settle"
        assert world.pool.find("guest:1@expert:gone") is None
        world.pool.end(found)
        assert (world.crowd, world.pool.names) == ([0], ())

    play(world, scene())


def test_ending_evicts_and_leaves_the_host(play: Play) -> None:
    world = World("expert:a", "expert:b")

    async def scene() -> None:
        process = await world.begin()
        await world.begin()
        world.pool.end(process)
        world.pool.end(process)
        assert sum(world.crowd) == 1
        world.pool.stop()
        assert world.crowd == [0, 0]

    play(world, scene())


def test_who_is_ended_before_it_has_a_home_never_gets_one(play: Play) -> None:
    world = World("expert:a")
    world.serving.clear()

    async def scene() -> None:
        process = world.pool.take(1)
        coming = asyncio.ensure_future(process.actor.begin.remote("host-0", 1))
        await asyncio.sleep(TICK_S)
        assert await process.actor.progress.remote() == (0, 1)
        assert await process.actor.stop.remote() is None
        world.pool.end(process)
        world.serving.append("expert:a")
        with pytest.raises(RayActorError, match="ended before it had a home"):
            await coming
        assert world.crowd == [0]

    play(world, scene())


@pytest.mark.parametrize(("there", "told"), [(False, "the service p8000,.* has ended"), (True, "no expert host of")])
def test_without_a_service_or_room_the_run_is_given_up(play: Play, there: bool, told: str) -> None:
    world = World("expert:a")
    world.there = there
    world.serving.clear()

    async def scene() -> None:
        with pytest.raises(RayActorError, match=told) as raised:
            await world.begin()
        assert world.given_up == [str(raised.value)]

    play(world, scene())
