"""Processes of expert actors: made, kept waiting as stand-bys, found again after the controller died."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.expert_actor import GUESTS, ExpertActor
from cluster.guests import CALLS
from cluster.nodes import Node, least_crowded
from cluster.pool import Process
from cluster.processes import end_process
from cluster.resident import HostInfo
from cluster.spec import ServiceSpec

PLACE = 0.001  # of the resource that marks a node: no more than to be there
REST_S = 1.0  # after anything happened, before another stand-by is made: the hosts come first
log = logging.getLogger("shoal.fleet")


class ActorPool:
    """All expert actors of a service by name. A life takes a stand-by where one is warm, and a new process else.

    See `cluster.pool.Pool`.
    """

    def __init__(
        self, spec: ServiceSpec, token: str, nodes: Callable[[], Collection[Node]], remember: Callable[[], None]
    ) -> None:
        """`nodes`: where hosts may live now. `remember` saves `names`, before a new actor matters to anybody."""
        self._spec = spec
        self._nodes = nodes
        self._token = token
        self._remember = remember
        self._known: dict[str, Process] = {}
        self._waiting: list[Process] = []  # warm ones, or on their way there
        self._tasks: set[asyncio.Task[None]] = set()
        self._rest_until_s = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Actors that belong to this service; any other of its namespace ends itself."""
        return tuple(self._known)

    @property
    def standby(self) -> list[int]:
        """Process ids of those that wait."""
        return [process.pid for process in self._waiting if process.pid is not None]

    def take(self, threads: int) -> Process:
        """A process for a life, made for so many threads if it must be made."""
        self._rest_until_s = time.monotonic() + REST_S
        node = self._node_for_life()
        able = [each for each in self._waiting if node is None or each.node == node]
        if not able:
            return self._make(threads, node)
        process = next((each for each in able if each.pid is not None), able[0])
        self._waiting.remove(process)
        return process

    def find(self, name: str) -> Process | None:
        """An actor that an earlier controller made; None when it is gone."""
        try:
            actor = ray.get_actor(name, namespace=self._spec.namespace)
        except ValueError:
            return None
        process = self._known[name] = Process(name, actor)
        return process

    def end(self, process: Process) -> None:
        """Kill an actor, and forget it."""
        ray.kill(process.actor, no_restart=True)
        self._known.pop(process.name, None)

    async def insist(self, process: Process, info: HostInfo) -> None:
        """Kill a process that does not hear Ray: a frozen one."""
        await end_process(info.pid, info.node, ExpertActor.__name__)

    def keep_standby(self, threads: Callable[[], int]) -> None:
        """Begin to warm a stand-by, made for so many threads, where one is missing and things are quiet."""
        if self._short(time.monotonic()):
            self._refill(threads())

    def stop(self) -> None:
        """End all that are left."""
        for task in self._tasks:
            task.cancel()
        for process in tuple(self._known.values()):
            self.end(process)

    def _short(self, now_s: float) -> bool:
        if self._spec.reserves or now_s < self._rest_until_s or any(process.pid is None for process in self._waiting):
            return False
        if self._spec.node_resource is None:
            return len(self._waiting) < self._spec.standby
        return self._node_for_standby() is not None

    def _refill(self, threads: int) -> None:
        process = self._make(threads, self._node_for_standby() if self._spec.node_resource is not None else None)
        self._waiting.append(process)
        task = asyncio.create_task(self._warm(process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _warm(self, process: Process) -> None:
        try:
            process.pid = await process.actor.warm.remote()
            await process.actor.wait_for_end.remote()
        except RayError as error:  # also one of an actor whose node went before it was there
            log.info("a stand-by ended: %s", error)
        finally:
            if process in self._waiting:  # it was nobody yet
                self._waiting.remove(process)
                self._known.pop(process.name, None)
                self._rest_until_s = time.monotonic() + REST_S

    def _emptiest_node(self) -> str | None:
        """Ray itself would not spread what reserves nothing."""
        return least_crowded(self._nodes(), Counter(process.node for process in self._known.values()))

    def _node_for_life(self) -> str | None:
        """Where the next life shall be; None: wherever a stand-by is, or Ray finds what it reserves."""
        if self._spec.node_resource is None:
            return None
        serving = Counter(process.node for process in self._known.values() if process not in self._waiting)
        node = min((each.id for each in self._nodes()), key=lambda each: serving[each], default=None)
        return None if self._spec.reserves and serving[node] else node

    def _node_for_standby(self) -> str | None:
        """A node that lacks one; each has its own, so that a host comes back where it was."""
        waiting = Counter(process.node for process in self._waiting)
        return next((node.id for node in self._nodes() if waiting[node.id] < self._spec.standby), None)

    def _make(self, threads: int, node: str | None) -> Process:
        name = f"expert:{secrets.token_hex(8)}"
        resources = dict(self._spec.resources)
        if self._spec.node_resource is not None:  # wherever else there is room, this process must not go
            resources[self._spec.node_resource] = PLACE
        elif node is None and not self._spec.reserves:
            node = self._emptiest_node()
        actor = (
            ray.remote(concurrency_groups={GUESTS: CALLS})(ExpertActor)
            .options(
                name=name,
                namespace=self._spec.namespace,
                lifetime="detached",
                max_restarts=0,
                max_concurrency=12,
                num_cpus=self._spec.cpus,
                num_gpus=self._spec.gpus,
                resources=resources,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False) if node else "SPREAD",
            )
            .remote(self._spec, name, self._token, threads)
        )
        process = self._known[name] = Process(name, actor, node)
        self._remember()
        return process
