"""The controller: starts the expert hosts, publishes who holds what, restarts what died, ends with its service."""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Coroutine
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.fleet import Fleet
from cluster.policy import GiveUp, decide, table
from cluster.spec import CONTROLLER_NAME, ServiceSpec
from cluster.state import ControllerState, delete_state, load_state, save_state
from model.checkpoint import Checkpoint
from router.placement import Host, Placement, initial_placement

TICK_S = 0.25
WORKER_SILENT_S = 5.0  # without a heartbeat after which an attention worker is not offered
APPLICATION_CHECK_S = 2.0
APPLICATION_ANSWER_S = 20.0
APPLICATION_MISSES = 3
APPLICATION_COMES_S = 120.0  # for the application to be there, where the controller was started first
log = logging.getLogger("shoal.controller")


class Controller:
    """An async, detached, named actor; Ray restarts it, and it then finds its hosts where it left them."""

    async def __init__(self, spec: ServiceSpec) -> None:  # type: ignore[misc]  # Ray awaits it
        self._spec = spec
        saved = load_state(spec.name)
        self._token = saved.token if saved else secrets.token_hex(16)
        self._epoch = saved.epoch if saved else 0
        self._placement: Placement | None = None
        self._published = asyncio.Condition()
        self._workers: dict[str, dict[str, Any]] = {}
        self._worker_version = 0
        self._ever_ready = saved is not None and saved.epoch > 0
        self._reason: str | None = None
        self._stopping = False
        self._application_came = False
        self._fleet = Fleet(spec, self._token)
        self._tasks = [self._supervised(self._run(saved))]

    def token(self) -> str:
        """The secret that guards hosts' and workers' doors."""
        return self._token

    async def watch(self, epoch: int, timeout_s: float) -> str | None:
        """The placement as JSON as soon as it is newer than `epoch`; None after `timeout_s` seconds."""

        def newer() -> bool:
            return self._placement is not None and self._placement.epoch > epoch

        try:
            async with asyncio.timeout(timeout_s), self._published:
                await self._published.wait_for(newer)
        except TimeoutError:
            return None
        return self._placement.to_json() if self._placement else None

    async def heartbeat(self, worker: dict[str, Any]) -> None:
        """An attention worker is alive at worker["address"]."""
        known = self._workers.get(worker["id"])
        self._workers[worker["id"]] = {**worker, "seen_s": time.monotonic()}
        self._application_came = True
        if known is None or known["address"] != worker["address"]:
            await self._workers_changed()

    async def leave(self, worker_id: str) -> None:
        """An attention worker is going."""
        if self._workers.pop(worker_id, None) is not None:
            await self._workers_changed()

    async def watch_workers(self, version: int, timeout_s: float) -> tuple[int, dict[str, str]]:
        """Attention workers, id to address, once they differ from `version`, or after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s), self._published:
                await self._published.wait_for(lambda: self._worker_version != version)
        except TimeoutError:
            pass
        return self._worker_version, {worker_id: worker["address"] for worker_id, worker in self._workers.items()}

    def report(self, host_id: str, generation: int, reason: str) -> None:
        """A client could not reach a host: look at once, and do not wait for the next tick."""
        self._fleet.changed.set()

    def status(self) -> dict[str, Any]:
        """What `shoal status` prints."""
        held = self._placement.held_by if self._placement else None
        return {
            "epoch": self._placement.epoch if self._placement else 0,
            "model": self._spec.model,
            "state": self._state(),
            "reason": self._reason,
            "expert_hosts": [
                {
                    "id": life.view.id,
                    "pid": life.info.pid if life.info else None,
                    "node": life.info.node if life.info else None,
                    "state": life.view.state,
                    "generation": life.view.generation,
                    "experts": len(held(life.view.id)) if held else 0,
                    "bytes": life.info.nbytes if life.info else 0,
                    "progress": list(life.progress),
                }
                for life in self._fleet.lives.values()
            ],
            "attention_workers": [
                {key: value for key, value in worker.items() if key not in ("address", "seen_s")}
                for worker in self._workers.values()
            ],
            "controller": {"pid": os.getpid()},
        }

    async def shutdown(self) -> None:
        """End the hosts, forget the state, and end this actor for good."""
        self._stopping = True
        await self._fleet.stop()
        delete_state(self._spec.name)
        asyncio.get_running_loop().call_later(0.2, self._end)

    def _supervised(self, loop: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a loop of this actor. One that fails takes the process with it: Ray starts the next, which recovers."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                log.critical("the controller failed and restarts", exc_info=task.exception())
                os._exit(1)

        task = asyncio.create_task(loop)
        task.add_done_callback(ended)
        return task

    def _end(self) -> None:
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _state(self) -> str:
        if self._stopping:
            return "stopping"
        if self._reason is not None:
            return "failed"
        if not self._ever_ready:
            return "starting"
        return "ready" if all(view.state == "ready" for view in self._fleet.views()) else "degraded"

    async def _run(self, saved: ControllerState | None) -> None:
        try:
            config = Checkpoint.open(self._spec.model).config
            blank = [Host(f"host-{index}", 1, "") for index in range(self._spec.hosts)]
            intended = initial_placement(config, blank, self._spec.replicas)
        except ValueError as error:
            self._reason = str(error)
            return
        generations = saved.generations if saved else {}
        for host in blank:
            last = generations.get(host.id, 0)
            if not (last and await self._fleet.adopt(host.id, last)):
                self._fleet.start(host.id, last + 1, list(intended.held_by(host.id)))
        self._tasks.append(self._supervised(self._follow_application()))
        while not self._stopping and self._reason is None:
            await self._tick(intended)
            await self._fleet.refresh_progress()
            try:
                await asyncio.wait_for(self._fleet.changed.wait(), TICK_S)
            except TimeoutError:
                continue

    async def _tick(self, intended: Placement) -> None:
        self._fleet.changed.clear()
        views = self._fleet.views()
        newest = table(intended.owners, views, self._epoch + 1)
        if newest is not None and self._differs(newest):
            self._epoch, self._placement, self._ever_ready = newest.epoch, newest, True
            self._save()
            async with self._published:
                self._published.notify_all()
        failures = [life.failure for life in self._fleet.lives.values() if life.failure]
        if failures and not self._ever_ready:
            await self._give_up(failures[0])
            return
        for decision in decide(views, self._ever_ready, time.monotonic()):
            if isinstance(decision, GiveUp):
                await self._give_up(decision.reason)
                return
            self._fleet.start(decision.host_id, decision.generation, list(intended.held_by(decision.host_id)))
            self._save()
        silent = time.monotonic() - WORKER_SILENT_S
        for worker_id in [key for key, worker in self._workers.items() if worker["seen_s"] < silent]:
            await self.leave(worker_id)

    def _differs(self, newest: Placement) -> bool:
        current = self._placement
        return current is None or (current.hosts, current.owners) != (newest.hosts, newest.owners)

    async def _give_up(self, reason: str) -> None:
        self._reason = reason
        await self._fleet.stop()

    async def _workers_changed(self) -> None:
        async with self._published:
            self._worker_version += 1
            self._published.notify_all()

    def _save(self) -> None:
        generations = {view.id: view.generation for view in self._fleet.views()}
        save_state(self._spec.name, ControllerState(self._epoch, self._token, generations))

    async def _follow_application(self) -> None:
        """Shut down once the Serve application is gone, or did not come."""
        misses, started_s = 0, time.monotonic()
        while self._spec.follow_application and misses < APPLICATION_MISSES:
            await asyncio.sleep(APPLICATION_CHECK_S)
            try:
                async with asyncio.timeout(APPLICATION_ANSWER_S):
                    present = self._spec.name in (await asyncio.to_thread(serve.status)).applications
            except (RayError, RayServeException, TimeoutError, ValueError, RuntimeError):
                log.warning("Serve does not say which applications run; asking again", exc_info=True)
                continue  # its controller is being restarted
            # an application may be deleted before it was once seen here: its workers came, so it was there
            self._application_came = self._application_came or present
            if self._application_came or time.monotonic() > started_s + APPLICATION_COMES_S:
                misses = 0 if present else misses + 1
        if self._spec.follow_application:
            await self.shutdown()


def get_or_start_controller(spec: ServiceSpec) -> Any:
    """The service's controller, started if it does not run yet; safe to call from several actors at once."""
    return (
        ray.remote(Controller)
        .options(
            name=CONTROLLER_NAME,
            namespace=spec.namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=1000,
            num_cpus=0,
        )
        .remote(spec)
    )


def find_controller(namespace: str) -> Any:
    """The running controller of a namespace; raises ValueError when there is none."""
    return ray.get_actor(CONTROLLER_NAME, namespace=namespace)
