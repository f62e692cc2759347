"""The conductor's body: carries out what it decides, lets everybody know, remembers, and ends with its service."""

import asyncio
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any

import ray

from cluster.actions import GiveUp, Publish, Save
from cluster.application import wait_until_over
from cluster.balance import Balance
from cluster.conductor import WORKERS_HEARD_S, Conductor
from cluster.describe import (
    state_name,
)
from cluster.events import Event, EventLog
from cluster.fleet import Fleet
from cluster.following import Following
from cluster.joining import Joining, contents_of
from cluster.lodging import open_pool
from cluster.node_follower import Desired
from cluster.notice import Notice
from cluster.plan import ModelShape
from cluster.pool import Pool
from cluster.saved import Committed, SavedState
from cluster.spec import ServiceSpec
from cluster.state import ControllerState, delete_state, load_state, save_state
from cluster.workers import Workers
from model.adapters.overlay import open_with_adapters
from router.holding import Holding
from router.placement import Host, Placement, initial_placement

TICK_S = 0.25
log = logging.getLogger("shoal.controller")


class Body:
    """What runs in the controller's process, beside those who call it."""

    async def __init__(self, spec: ServiceSpec) -> None:  # type: ignore[misc]  # Ray awaits it
        self._spec = spec
        saved = load_state(spec.name)
        self._conductor: Conductor | None = None  # until the model is known
        self._fleet: Fleet | None = None
        self._pool: Pool | None = None  # until it is known which actors there are
        self._state = saved or ControllerState(secrets.token_hex(16))
        self._balance: Balance | None = None
        self._following: Following | None = None
        if spec.node_resource is not None:
            self._following = Following(spec.node_resource, self._state.desired, self._remember_desired)
        self._placement: Placement | None = None
        self._notice = Notice()  # of a table, the workers, or a change
        self._changed = asyncio.Event()  # something that the conductor should act on
        self._events = EventLog(_log_event)
        self._workers = Workers(self._events, time.monotonic() + WORKERS_HEARD_S if saved is not None else -math.inf)
        self._joining = Joining(spec, self._state.joining)
        self._known = asyncio.Event()  # which files the service has, or that it cannot start
        self._reason: str | None = None  # why the service cannot start
        self._waiting: str | None = None  # for what, before it can
        self._stopping = False
        self._application_came = False
        self._tasks = [self._supervised(self._run()), self._supervised(self._follow_application())]

    async def leave(self, worker_id: str, reason: str = "it said so") -> None:
        """An attention worker is going, or gone."""
        self._workers.leave(worker_id, reason, time.monotonic())
        if self._conductor is not None:
            self._conductor.worker_left(worker_id)
        self._changed.set()
        await self._notice.give()

    async def shutdown(self) -> None:
        """End the hosts, forget the state, and end this actor for good."""
        self._stopping = True
        if self._fleet is not None:
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

    def _fail(self, reason: str) -> None:
        self._reason = reason
        self._joining.failed(time.monotonic())
        self._known.set()

    async def _take_on(self, news: Mapping[str, Any]) -> None:
        """What the application is deployed with from now on."""
        self._events.record("redeployed", time.monotonic(), **{name: str(value) for name, value in news.items()})
        if self._balance is not None:
            self._balance.automatic = self._joining.told["auto_rebalance"]
        self._remember()
        self._changed.set()

    def _wait(self, reason: str | None) -> None:
        self._waiting = reason

    def _end(self) -> None:
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _state_name(self) -> str:
        return state_name(self._stopping, self._reason, self._conductor, self._placement)

    async def _run(self) -> None:
        try:
            checkpoint = open_with_adapters(self._spec.model, self._spec.adapters)
            self._joining.opened(contents_of(checkpoint))
            self._known.set()
            hosts = self._spec.hosts
            if self._following is not None and self._state.core is None:
                hosts = await self._following.first_hosts(hosts, checkpoint.config.n_routed_experts, self._wait)
            blank = [Host(f"host-{index}", 1, "") for index in range(hosts)]
            owners = initial_placement(checkpoint.config, blank, self._spec.replicas).owners
        except ValueError as error:
            self._fail(str(error))
            return
        if self._following is not None:
            await self._following.look()  # before anybody can ask for room
        config, ids = checkpoint.config, tuple(host.id for host in blank)
        shape = ModelShape(config.moe_layers, config.n_routed_experts, config.n_group)
        self._balance = Balance(shape, self._joining.told["auto_rebalance"])
        self._conductor = conductor = Conductor(
            shape,
            Committed(Holding.from_owners(owners, ids), ids, self._spec.replicas, extra=0),
            self._balance.loads,
            self._events,
            self._state.core,
        )
        pool = open_pool(self._spec, self._state.token, self._following, self._remember, conductor.give_up)
        self._fleet = fleet = Fleet(self._spec, pool, self._state.stamps, conductor, self._changed)
        await fleet.adopt(self._state.actors)
        self._pool = pool
        self._tasks.append(self._supervised(self._follow_progress(fleet)))
        if self._following is not None:
            self._tasks.append(self._supervised(self._follow_nodes(self._following, conductor, fleet)))
        while not self._stopping and self._reason is None:
            self._changed.clear()
            await self._act(conductor, fleet, self._balance)
            try:
                await asyncio.wait_for(self._changed.wait(), TICK_S)
            except TimeoutError:
                continue

    async def _act(self, conductor: Conductor, fleet: Fleet, balance: Balance) -> None:
        now_s = time.monotonic()
        for worker_id in self._workers.silent(now_s):
            await self.leave(worker_id, "it is silent")
        if self._joining.pursue(conductor, now_s):
            self._remember()
        balance.consider(conductor, now_s)
        for action in conductor.act(now_s):
            if isinstance(action, Save):
                self._remember(core=action.state)
            elif isinstance(action, Publish):
                self._placement = action.placement
                fleet.share_cores(len(action.placement.hosts))
            elif isinstance(action, GiveUp):
                self._fail(action.reason)
                await fleet.stop()
            else:
                fleet.carry_out(action)
        if self._state_name() == "ready" and self._workers.settled(now_s):
            fleet.keep_standby()
        await self._notice.give()

    def _begun(self, conductor: Conductor) -> None:
        """A change may have been begun: see to it that it is saved before anybody hears of it, and goes on."""
        if conductor.state != self._state.core:
            self._remember(core=conductor.state)
        self._changed.set()

    def _remember(self, core: SavedState | None = None) -> None:
        """Save what the conductor wants saved, the actors that there are, and the files that they read."""
        if self._pool is not None and self._fleet is not None:
            self._state = replace(self._state, actors=self._pool.names, stamps=dict(self._fleet.stamps))
        self._state = replace(self._state, core=core or self._state.core, joining=self._joining.state)
        save_state(self._spec.name, self._state)

    def _remember_desired(self, desired: Desired) -> None:
        self._state = replace(self._state, desired=desired)
        save_state(self._spec.name, self._state)

    async def _follow_progress(self, fleet: Fleet) -> None:
        """Beside the conductor's loop, which waits for nobody: a process that is only starting answers late."""
        while not self._stopping:
            await fleet.refresh_progress()
            await asyncio.sleep(TICK_S)

    async def _follow_nodes(self, following: Following, conductor: Conductor, fleet: Fleet) -> None:
        """One host on each node, as far as nobody wants it otherwise."""
        while not self._stopping:
            if await following.follow(conductor, fleet.homes):
                self._begun(conductor)

    async def _follow_application(self) -> None:
        if await wait_until_over(self._spec, lambda: self._application_came, lambda: self._workers.any):
            await self.shutdown()


def _log_event(event: Event) -> None:
    log.info(json.dumps({"event": event.kind, "number": event.number, **event.fields}))
