"""The one place that makes Ray calls about expert actors: start, watch, load, end."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.expert_actor import ExpertActor, HostInfo
from cluster.policy import QUICK_DEATH_S, HostView
from cluster.spec import ServiceSpec, host_actor_name
from cluster.threads import host_threads, thread_environment

STOP_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Life:
    """A host's running life: its actor, and what is known of it."""

    view: HostView
    actor: Any
    started_s: float
    info: HostInfo | None = None
    progress: tuple[int, int] = (0, 1)
    failure: str | None = None  # why loading failed, when trying again cannot help


class Fleet:
    """Expert actors by host id."""

    def __init__(self, spec: ServiceSpec, token: str) -> None:
        self._spec = spec
        self._token = token
        self.lives: dict[str, Life] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()

    def views(self) -> list[HostView]:
        return [life.view for life in self.lives.values()]

    def start(self, host_id: str, generation: int, held: list[tuple[int, int]]) -> None:
        """Start a life and load it in the background; `changed` is set when it is ready or dead."""
        nodes = sum(node["Alive"] for node in ray.nodes())
        threads = self._spec.threads or host_threads(self._spec.hosts, max(1, nodes))
        actor = (
            ray.remote(ExpertActor)
            .options(
                name=host_actor_name(host_id, generation),
                namespace=self._spec.namespace,
                lifetime="detached",
                max_restarts=0,
                max_concurrency=8,
                num_cpus=self._spec.cpus,
                num_gpus=self._spec.gpus,
                scheduling_strategy="SPREAD",
                runtime_env={"env_vars": thread_environment(threads)},
            )
            .remote(self._spec, host_id, generation, self._token, threads)
        )
        previous = self.lives.get(host_id)
        quick_deaths = previous.view.quick_deaths if previous is not None else 0
        view = HostView(host_id, generation, "loading", quick_deaths=quick_deaths)
        self.lives[host_id] = Life(view, actor, time.monotonic())
        self._spawn(self._live(self.lives[host_id], held))

    async def adopt(self, host_id: str, generation: int) -> bool:
        """Take over a life that an earlier controller started; False when it is gone."""
        try:
            actor = ray.get_actor(host_actor_name(host_id, generation), namespace=self._spec.namespace)
            info = await asyncio.wait_for(actor.info.remote(), STOP_TIMEOUT_S)
        except (TimeoutError, ValueError, RayActorError, RayTaskError):
            return False
        view = HostView(host_id, generation, "ready", address=info.address)
        self.lives[host_id] = Life(view, actor, time.monotonic(), info)
        self._spawn(self._watch(self.lives[host_id]))
        return True

    async def refresh_progress(self) -> None:
        """Ask hosts that are loading how far they are."""
        for life in self.lives.values():
            if life.view.state == "loading":
                try:
                    life.progress = await asyncio.wait_for(life.actor.progress.remote(), 1.0)
                except (TimeoutError, RayActorError):
                    continue

    async def stop(self) -> None:
        """End every actor: ask first, then insist."""
        for task in self._tasks:
            task.cancel()
        asked = [life.actor.stop.remote() for life in self.lives.values()]
        await asyncio.gather(*(self._settle(reference) for reference in asked))
        for life in self.lives.values():
            ray.kill(life.actor, no_restart=True)

    async def _live(self, life: Life, held: list[tuple[int, int]]) -> None:
        try:
            info = await life.actor.load.remote(held)
        except RayTaskError as error:  # it said why: the checkpoint is at fault, not the host
            life.failure = str(error.cause).splitlines()[0] if error.cause else str(error).splitlines()[-1]
            self._died(life)
            return
        except RayActorError:
            self._died(life)
            return
        life.info = info
        life.progress = (info.experts, info.experts)
        life.view = replace(life.view, state="ready", address=info.address)
        self.changed.set()
        await self._watch(life)

    async def _watch(self, life: Life) -> None:
        with contextlib.suppress(RayActorError):
            await life.actor.wait_for_end.remote()
        self._died(life)

    def _died(self, life: Life) -> None:
        now_s = time.monotonic()
        quick = now_s - life.started_s < QUICK_DEATH_S
        deaths = life.view.quick_deaths + 1 if quick else 1
        life.view = replace(life.view, state="dead", died_at_s=now_s, quick_deaths=deaths)
        self.changed.set()

    async def _settle(self, reference: Any) -> None:
        try:
            await asyncio.wait_for(reference, STOP_TIMEOUT_S)
        except (TimeoutError, RayActorError, RayTaskError):
            return

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
