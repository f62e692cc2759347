"""Processes of expert actors: made, kept waiting as stand-bys, found again after the controller died."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.expert_actor import ExpertActor
from cluster.spec import ServiceSpec
from cluster.threads import thread_environment

REST_S = 1.0  # after anything happened, before another stand-by is made: the hosts come first
log = logging.getLogger("shoal.fleet")


@dataclass(slots=True, eq=False)
class Process:
    """An expert actor; `pid` is known once it is warm."""

    name: str
    actor: Any
    node: str | None = None  # where it was meant to start; None: where Ray liked
    pid: int | None = None


class ActorPool:
    """All expert actors of a service by name. A life takes a stand-by where one is warm, and a new process else."""

    def __init__(self, spec: ServiceSpec, token: str, remember: Callable[[], None]) -> None:
        """`remember` saves `names`; it is called before a new actor matters to anybody."""
        self._spec = spec
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
        if not self._waiting:
            return self._make(threads)
        process = next((each for each in self._waiting if each.pid is not None), self._waiting[0])
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

    def short(self, now_s: float) -> bool:
        """Whether a stand-by is missing, and things are quiet."""
        full = self._spec.reserves or len(self._waiting) >= self._spec.standby
        return not full and now_s >= self._rest_until_s and all(process.pid is not None for process in self._waiting)

    def refill(self, threads: int) -> None:
        """Begin to warm a stand-by, made for so many threads."""
        process = self._make(threads)
        self._waiting.append(process)
        task = asyncio.create_task(self._warm(process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """End all that are left."""
        for task in self._tasks:
            task.cancel()
        for process in tuple(self._known.values()):
            self.end(process)

    async def _warm(self, process: Process) -> None:
        try:
            process.pid = await process.actor.warm.remote()
            await process.actor.wait_for_end.remote()
        except (RayActorError, RayTaskError) as error:
            log.info("a stand-by ended: %s", error)
        if process in self._waiting:  # it was nobody yet
            self._waiting.remove(process)
            self._known.pop(process.name, None)
            self._rest_until_s = time.monotonic() + REST_S

    def _emptiest_node(self) -> str:
        """The node with the fewest of these actors for its cores. Ray itself would not spread what reserves nothing."""
        crowd = Counter(process.node for process in self._known.values())
        nodes = [node for node in ray.nodes() if node["Alive"]]
        emptiest = min(
            nodes, key=lambda node: (crowd[node["NodeID"]] + 1) / max(1.0, node["Resources"].get("CPU", 0.0))
        )
        return str(emptiest["NodeID"])

    def _make(self, threads: int) -> Process:
        name = f"expert:{secrets.token_hex(8)}"
        node = None if self._spec.reserves else self._emptiest_node()
        actor = (
            ray.remote(ExpertActor)
            .options(
                name=name,
                namespace=self._spec.namespace,
                lifetime="detached",
                max_restarts=0,
                max_concurrency=12,
                num_cpus=self._spec.cpus,
                num_gpus=self._spec.gpus,
                resources=dict(self._spec.resources),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False) if node else "SPREAD",
                runtime_env={"env_vars": thread_environment(threads)},
            )
            .remote(self._spec, name, self._token, threads)
        )
        process = self._known[name] = Process(name, actor, node)
        self._remember()
        return process
