"""Expert hosts that are guests: lives of a training run, say, in the processes of a running service's hosts."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.actor_pool import ActorPool
from cluster.expert_actor import GUESTS
from cluster.following import Following
from cluster.nodes import living_nodes
from cluster.pool import Pool, Process
from cluster.resident import HostInfo
from cluster.spec import CONTROLLER_NAME, ServiceSpec, namespace_of

LOOK_S = 0.5
ANSWER_S = 5.0
APART_S = 10.0  # that a guest waits for a host without another one of this run: a lost host comes back meanwhile
ROOM_S = 240.0  # that it waits for any host at all
GONE_S = 60.0  # without the service's controller: it has ended then
log = logging.getLogger("shoal.fleet")


def open_pool(
    spec: ServiceSpec,
    token: str,
    following: Following | None,
    remember: Callable[[], None],
    give_up: Callable[[str], None],
) -> Pool:
    """Where the hosts of `spec` live; see `ActorPool` and `LodgingPool`."""
    if spec.lodges_with is not None:
        return LodgingPool(spec, spec.lodges_with, token, remember, give_up)
    nodes = following.usable if following is not None else partial(living_nodes, None)
    return ActorPool(spec, token, nodes, remember)


class Seat:
    """A guest, as an actor's handle: `seat.METHOD.remote(...)` begins a call, which can be awaited.

    It has no home before `begin`, which finds one.
    """

    def __init__(self, process: Process, find_home: Callable[[Process, "Seat"], Awaitable[None]]) -> None:
        self.home: Any = None  # the actor whose guest it is
        self._process = process
        self._find_home = find_home

    def __getattr__(self, method: str) -> "_Method":
        return _Method(self, method)

    async def begin_at_home(self, *arguments: Any) -> Any:
        await self._find_home(self._process, self)
        return await self.ask("begin", *arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        return self.home.guest.options(concurrency_group=GUESTS).remote(self._process.name, method, *arguments)


class _Method:
    def __init__(self, seat: Seat, name: str) -> None:
        self._seat = seat
        self._name = name

    def remote(self, *arguments: Any) -> Any:
        if self._name == "begin":
            return self._seat.begin_at_home(*arguments)
        if self._seat.home is None:
            return self._not_begun()
        return self._seat.ask(self._name, *arguments)

    async def _not_begun(self) -> tuple[int, int] | None:
        """Who has no home has loaded nothing, and has nothing to stop."""
        return (0, 1) if self._name == "progress" else None


class LodgingPool:
    """Seats in the processes of a running service's hosts, which are that service's to make, kill and give threads.

    See `cluster.pool.Pool`. Ray's errors pass through: when a process dies its guests have died, and their next lives
    look for room again.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        service: str,
        token: str,
        remember: Callable[[], None],
        give_up: Callable[[str], None],
    ) -> None:
        """`remember` saves `names`, before a guest matters to anybody; `give_up` hears that there will be no room."""
        self._spec = spec
        self._service = service
        self._token = token
        self._remember = remember
        self._give_up = give_up
        self._seats: dict[Process, Seat] = {}
        self._hosts: dict[str, tuple[str, int]] = {}  # of the service: id and generation by actor, as last heard

    @property
    def names(self) -> tuple[str, ...]:
        """Guests that have a home, which each name ends with: so the next controller finds them."""
        return tuple(process.name for process, seat in self._seats.items() if seat.home is not None)

    @property
    def standby(self) -> list[int]:
        """None: the service keeps its own."""
        return []

    def take(self, threads: int) -> Process:
        """A seat, whose home is found when it begins; with how many threads is computed there is the service's say."""
        process, _ = self._make(f"guest:{secrets.token_hex(8)}")
        return process

    def find(self, name: str) -> Process | None:
        """A guest that an earlier controller took in; None when its home is gone."""
        home = self._actor(_home_of(name))
        if home is None:
            return None
        process, seat = self._make(name)
        seat.home = home
        return process

    def end(self, process: Process) -> None:
        """Evict a guest, and forget it; its home goes on."""
        seat = self._seats.pop(process, None)
        if seat is not None and seat.home is not None:
            self._evict(process, seat)

    async def insist(self, process: Process, info: HostInfo) -> None:
        """Tell the service, whose process it is to kill; if it goes on instead, it evicts the guest."""
        log.warning("process %d of the service %s does not hear Ray", info.pid, self._service)
        self._suspect(_home_of(process.name))

    def keep_standby(self, threads: Callable[[], int]) -> None:
        """Nothing: where a guest's home dies, the service brings another process."""

    def stop(self) -> None:
        """Evict all that are left."""
        for process in tuple(self._seats):
            self.end(process)

    def _make(self, name: str) -> tuple[Process, Seat]:
        process = Process(name, None)
        seat = self._seats[process] = process.actor = Seat(process, self._find_home)
        return process, seat

    async def _find_home(self, process: Process, seat: Seat) -> None:
        """Be admitted where the fewest guests of this run are; raises RayActorError when that cannot be."""
        began_s = heard_s = time.monotonic()
        refused: set[str] = set()
        while True:
            hosts, now_s = await self._residents(), time.monotonic()
            if process not in self._seats:
                raise RayActorError(error_msg="it was ended before it had a home")
            if hosts is not None:
                heard_s = now_s
                choice = self._choose([host for host in hosts if host not in refused], now_s < began_s + APART_S)
                if choice is None:
                    refused.clear()
                elif await self._admit(process, seat, choice):
                    return
                else:
                    refused.add(choice)
            if now_s >= heard_s + GONE_S:
                self._despair(f"the service {self._service}, whose hosts held the experts, has ended: start it again")
            if now_s >= began_s + ROOM_S:
                self._despair(f"no expert host of the service {self._service} took a guest in for {ROOM_S:.0f} s")
            await asyncio.sleep(LOOK_S)

    def _despair(self, reason: str) -> None:
        self._give_up(reason)
        raise RayActorError(error_msg=reason)

    async def _residents(self) -> tuple[str, ...] | None:
        """Actors that may take guests; None where the service's controller does not say."""
        controller = self._actor(CONTROLLER_NAME)
        if controller is None:
            return None
        try:
            self._hosts = await asyncio.wait_for(controller.residents.remote(), ANSWER_S)
        except (RayActorError, TimeoutError):
            return None
        return tuple(self._hosts)

    def _suspect(self, home: str) -> None:
        controller = self._actor(CONTROLLER_NAME)
        if controller is not None and home in self._hosts:
            controller.report.remote(*self._hosts[home], "it does not answer for its guests")

    def _choose(self, hosts: list[str], apart: bool) -> str | None:
        crowd = Counter(map(_home_of, self.names))
        choice = min(hosts, key=lambda host: crowd[host], default=None)
        return None if choice is not None and apart and crowd[choice] else choice

    async def _admit(self, process: Process, seat: Seat, host: str) -> bool:
        home = self._actor(host)
        if home is None:
            return False
        seat.home, process.name = home, f"{process.name.partition('@')[0]}@{host}"
        self._remember()
        try:
            admit = home.admit.options(concurrency_group=GUESTS).remote(self._spec, process.name, self._token)
            admitted: bool = await asyncio.wait_for(admit, ANSWER_S)
        except RayActorError:
            admitted = False
        except TimeoutError:
            self._evict(process, seat)
            self._suspect(host)
            admitted = False
        if not admitted:
            seat.home = None
        return admitted

    def _evict(self, process: Process, seat: Seat) -> None:
        seat.home.evict.options(concurrency_group=GUESTS).remote(process.name)

    def _actor(self, name: str) -> Any | None:
        try:
            return ray.get_actor(name, namespace=namespace_of(self._service))
        except ValueError:
            return None


def _home_of(name: str) -> str:
    return name.partition("@")[2]
