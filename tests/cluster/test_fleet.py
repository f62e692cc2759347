"""Whatever Ray says of an expert actor reaches the conductor, and nothing of it ends the controller."""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnschedulableError, NodeDiedError, RayActorError, RayError, RayTaskError

from cluster import fleet as fleet_module
from cluster import life as life_module
from cluster.actions import GiveUp, Publish, Save
from cluster.change import Phase, Wish
from cluster.fleet import Fleet
from cluster.pool import Process
from cluster.resident import HostInfo
from cluster.roster import HostReport
from cluster.spec import ServiceSpec
from router.holding import Pair
from tests.cluster.test_conductor import DEADLINES, Service, pairs

NEVER: Any = object()  # no answer comes
ENDS = [
    ActorUnschedulableError("The node specified via NodeAffinitySchedulingStrategy doesn't exist any more"),
    NodeDiedError("its node died"),
    RayActorError(error_msg="it died"),
]
each_end = pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)


class Actor:
    """A life's handle: a method answers what `answers` has for it, and else serves."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"wait_for_end": NEVER}
        self.ended = asyncio.Event()
        self._report: HostReport | None = None

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(self._answer(method, *arguments)))

    async def _answer(self, method: str, *arguments: Any) -> Any:
        answer = self.answers.get(method)
        if answer is NEVER:
            await self.ended.wait()
            raise RayActorError(error_msg="it was killed")
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, asyncio.Future):
            return await answer
        return answer if method in self.answers else getattr(self, f"_{method}")(*arguments)

    def _begin(self, host_id: str, generation: int, held: frozenset[Pair], threads: int, stamps: object) -> HostInfo:
        self._report = HostReport(host_id, generation, f"{host_id}:{generation}", held)
        return self._settle()

    def _settle(self) -> HostInfo:
        assert self._report is not None
        return HostInfo(self._report, pid=1, node="node", nbytes=0, stamps={}, load_s=0.0)

    def _take(self, change_id: str, further: frozenset[Pair], sources: object) -> tuple[HostInfo, int, int]:
        return self._settle(), 0, len(further)

    def _drop(self, surplus: frozenset[Pair]) -> HostInfo:
        return self._settle()

    def _share(self, share: object) -> None:
        return None

    def _ping(self) -> None:
        return None

    def _abandon(self, change_id: str) -> None:
        return None

    def _stop(self) -> None:
        self.ended.set()


class FakePool:
    """New processes, which answer as the test says."""

    names: tuple[str, ...] = ()
    standby: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.made: list[Process] = []
        self.ended: list[Process] = []
        self.answers: dict[str, Any] = {}  # of those that are made from now on

    def take(self, threads: int) -> Process:
        actor = Actor()
        actor.answers |= self.answers
        self.made.append(Process(f"expert:{len(self.made)}", actor))
        return self.made[-1]

    def find(self, name: str) -> Process | None:
        return next((process for process in self.made if process.name == name), None)

    def end(self, process: Process) -> None:
        self.ended.append(process)
        process.actor.ended.set()

    async def insist(self, process: Process, info: HostInfo) -> None:
        self.end(process)

    def stop(self) -> None:
        return


class World:
    """A fleet, its conductor and its pool, at a time that the test sets."""

    def __init__(self, hosts: int = 2) -> None:
        self.service = Service(hosts)
        self.conductor = self.service.conductor
        self.pool = FakePool()
        self.fleet = Fleet(ServiceSpec("s", "m"), self.pool, {}, self.conductor, asyncio.Event())  # type: ignore[arg-type]

    async def act(self, after_s: float = 0.0, times: int = 6) -> None:
        """What follows, and what follows from that."""
        for _ in range(times):
            for action in self.service.act(after_s):
                if not isinstance(action, Save | Publish | GiveUp):
                    self.fleet.carry_out(action)
            await asyncio.sleep(0.001)
            after_s = 0.0

    def state(self, host_id: str) -> tuple[str, int]:
        view = self.conductor.roster.views[host_id]
        return view.state, view.generation


Play = Callable[[Callable[[World], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """`play(scene)`: with a world of its own; an exception that nobody awaited fails the test."""
    monkeypatch.setattr(fleet_module, "living_nodes", lambda resource: [])

    def run(scene: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def all_told() -> None:
            lost: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: lost.append(context))
            world = World()
            clock = SimpleNamespace(monotonic=lambda: world.service.now_s)
            monkeypatch.setattr(fleet_module, "time", clock)
            await scene(world)
            done = [task for task in world.fleet._tasks if task.done()]
            assert [task.exception() for task in done if not task.cancelled() and task.exception() is not None] == []
            await world.fleet.stop()
            assert lost == []

        asyncio.run(asyncio.wait_for(all_told(), 20))

    return run


@each_end
def test_a_life_that_ends_before_it_began_is_followed_by_another(play: Play, end: RayError) -> None:
    async def scene(world: World) -> None:
        world.pool.answers = {"begin": end}
        await world.act(times=1)
        world.pool.answers = {}
        assert world.pool.ended == world.pool.made
        assert world.state("host-0") == ("dead", 1)
        assert str(end) in world.conductor.roster.views["host-0"].reason
        await world.act(after_s=1.0)
        assert (world.state("host-0"), world.state("host-1")) == (("ready", 2), ("ready", 2))

    play(scene)


def test_a_life_that_cannot_load_says_why(play: Play) -> None:
    async def scene(world: World) -> None:
        world.pool.answers = {"begin": RayTaskError("begin", "traceback", ValueError("no such file"), "a", 1, "ip")}
        await world.act()
        assert world.conductor.reason == "no such file"

    play(scene)


@each_end
def test_a_life_that_ends_while_it_serves_is_followed_by_another(play: Play, end: RayError) -> None:
    async def scene(world: World) -> None:
        world.pool.answers = {"wait_for_end": end}
        await world.act(times=1)
        world.pool.answers = {}
        await world.act(after_s=1.0)
        assert world.state("host-0") == ("ready", 2)

    play(scene)


@each_end
def test_who_does_not_say_how_far_it_is_ends_nothing_else(play: Play, end: RayError) -> None:
    async def scene(world: World) -> None:
        world.pool.answers = {"begin": NEVER, "progress": end}
        await world.act()
        await world.fleet.refresh_progress()
        assert world.state("host-0") == ("loading", 1)

    play(scene)


@each_end
def test_a_load_whose_host_ends_undoes_its_change(play: Play, end: RayError) -> None:
    async def scene(world: World) -> None:
        await world.act()
        change = world.service.begin(Wish("replicas", replicas=2))
        for process in world.pool.made:
            process.actor.answers["take"] = end
        await world.act()
        assert change.phase is Phase.ROLLED_BACK
        assert str(end) in (change.reason or "")
        assert world.state("host-0") == ("ready", 2)

    play(scene)


@each_end
def test_a_suspect_of_which_ray_knows_the_end_is_declared_dead(play: Play, end: RayError) -> None:
    async def scene(world: World) -> None:
        await world.act()
        world.pool.made[0].actor.answers["ping"] = end
        world.conductor.suspected("host-0", 1, "no reply", world.service.now_s)
        world.conductor.suspected("host-1", 1, "no reply", world.service.now_s)
        await world.act()
        assert (world.state("host-0"), world.state("host-1")) == (("ready", 2), ("ready", 1))

    play(scene)


@each_end
def test_an_earlier_controllers_life_that_has_ended_is_not_taken_over(play: Play, end: RayError) -> None:
    async def scene(world: World) -> None:
        process = world.pool.take(1)
        process.actor.answers["settle"] = end
        await world.fleet.adopt([process.name, "expert:gone"])
        assert world.pool.ended == [process]
        assert world.fleet.lives == {}

    play(scene)


@pytest.mark.parametrize("answers", [True, False])
def test_an_earlier_controllers_life_is_waited_for_while_it_answers(
    play: Play, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """What it still loads may come from a host that stands still."""
    monkeypatch.setattr(life_module, "ADOPT_TIMEOUTS_S", (0.01, 10.0))
    monkeypatch.setattr(life_module, "PROBE_TIMEOUTS_S", (0.01, 0.05))

    async def scene(world: World) -> None:
        process = world.pool.take(1)
        info = process.actor._begin("host-0", 1, pairs(0, 1), 1, {})
        settled = process.actor.answers["settle"] = asyncio.get_running_loop().create_future()
        if not answers:
            process.actor.answers["ping"] = NEVER
        adopting = asyncio.create_task(world.fleet.adopt([process.name]))
        await asyncio.sleep(0.1)
        assert world.pool.ended == ([] if answers else [process])
        if answers:
            settled.set_result(info)
        await adopting
        assert list(world.fleet.lives) == ([("host-0", 1)] if answers else [])

    play(scene)


@each_end
def test_a_life_that_cannot_be_asked_to_stop_is_ended(play: Play, end: RayError) -> None:
    async def scene(world: World) -> None:
        await world.act()
        for process in world.pool.made:
            process.actor.answers["stop"] = end
        await world.fleet.stop()
        assert set(map(id, world.pool.made)) <= set(map(id, world.pool.ended))

    play(scene)


@each_end
def test_pairs_that_a_host_did_not_drop_are_dropped_later(play: Play, end: RayError) -> None:
    async def scene(world: World) -> None:
        await world.act()
        world.service.begin(Wish("replicas", replicas=2))
        await world.act()
        world.service.begin(Wish("replicas", replicas=1))
        for process in world.pool.made:
            process.actor.answers["drop"] = end
        await world.act()
        assert world.service.held() == {"host-0": pairs(0, 1, 2, 3), "host-1": pairs(0, 1, 2, 3)}
        for process in world.pool.made:
            del process.actor.answers["drop"]
        await world.act()
        assert sum(map(len, world.service.held().values())) == 4

    play(scene)


def test_a_host_may_load_for_as_long_as_it_gets_on(play: Play) -> None:
    async def scene(world: World) -> None:
        world.pool.answers = {"begin": NEVER, "progress": (0, 2)}
        await world.act()
        for loaded in (0, 1, 2):
            world.pool.made[0].actor.answers["progress"] = (loaded, 2)
            await world.fleet.refresh_progress()
            await world.act(after_s=DEADLINES.prepare_s - 1.0)
            assert world.state("host-0") == ("loading", 1)
        await world.act(after_s=2.0)
        assert world.conductor.roster.views["host-0"].generation == 2
        assert world.pool.made[0] in world.pool.ended

    play(scene)


def test_a_change_may_load_for_as_long_as_it_gets_on(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.act()
        change = world.service.begin(Wish("replicas", replicas=2))
        for process in world.pool.made:
            process.actor.answers |= {"take": NEVER, "taken": 0}
        await world.act()
        for loaded in (1, 2):
            world.pool.made[1].actor.answers["taken"] = loaded
            await world.act(after_s=DEADLINES.prepare_s - 1.0)
            await world.fleet.refresh_progress()
        await world.act(after_s=DEADLINES.prepare_s - 1.0)
        assert (change.phase, change.progress) == (Phase.PREPARE, {"host-1": 2})
        await world.fleet.refresh_progress()  # it says the same again
        await world.act(after_s=2.0)
        assert change.phase is Phase.ROLLED_BACK
        assert world.service.held() == {"host-0": pairs(0, 1), "host-1": pairs(2, 3)}

    play(scene)


def test_a_load_that_is_undone_late_does_not_hide_how_far_the_next_one_is(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.act()
        first = world.service.begin(Wish("replicas", replicas=2))
        undone: list[asyncio.Future[Any]] = []
        for process in world.pool.made:
            undone.append(asyncio.get_running_loop().create_future())
            process.actor.answers |= {"take": undone[-1], "taken": 0}
        await world.act()
        await world.act(after_s=DEADLINES.prepare_s)
        assert first.phase is Phase.ROLLED_BACK
        for process in world.pool.made:
            process.actor.answers["take"] = NEVER
        second = world.service.begin(Wish("replicas", replicas=2))
        await world.act()
        for late in undone:
            late.set_exception(RayTaskError("take", "", ValueError("it was given up")))
        await world.act()
        world.pool.made[1].actor.answers["taken"] = 1
        await world.fleet.refresh_progress()
        assert (second.phase, second.progress) == (Phase.PREPARE, {"host-1": 1})

    play(scene)
