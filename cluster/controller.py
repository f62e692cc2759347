"""The controller, as hosts, workers, ingresses and operators call it."""

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Any

from cluster.change import ChangeRefused, Wish, not_ready
from cluster.controller_body import Body
from cluster.describe import (
    describe_difference,
    describe_events,
    describe_hosts,
    describe_service,
    residents,
)
from cluster.room import make_room
from cluster.spec import ServiceSpec
from experts.tls import TlsFiles


class Controller(Body):
    """An async, detached, named actor; Ray restarts it, and it then finds its hosts where it left them."""

    def token(self) -> str:
        """The secret that guards hosts' and workers' doors, and by which those who belong here are known."""
        return self._state.token

    async def join(self, spec: ServiceSpec, contents: str, worker: bool) -> str | None:
        """The token, for a part of this very service; None: ask again, or for one to come.

        A worker of another description under the same name, as the application has after it was deployed again, ends
        this service and makes room for its own. Raises OtherFiles for who reads other files than the service does.
        """
        if self._stopping:
            return None
        if not self._joining.belongs(spec, time.monotonic()):
            if worker:
                await self.shutdown()
            return None
        await self._known.wait()
        self._joining.check(contents)
        if worker and (news := self._joining.take_on(spec)):
            await self._take_on(news)
        return self._state.token

    async def watch(self, token: str, epoch: int, timeout_s: float) -> str | None:
        """The placement as JSON as soon as it is newer than `epoch`; None after `timeout_s` seconds."""
        if token != self._state.token:
            await asyncio.sleep(timeout_s)
            return None

        def newer() -> bool:
            return self._placement is not None and self._placement.epoch > epoch

        await self._notice.until(newer, timeout_s)
        return self._placement.to_json() if self._placement is not None and newer() else None

    async def heartbeat(self, token: str, worker: dict[str, Any]) -> bool:
        """An attention worker is alive at worker["address"], and uses no table older than worker["epoch"].

        False for one of an earlier service of this name.
        """
        if token != self._state.token:
            return False
        version = self._workers.version
        self._workers.beat(worker, time.monotonic())
        self._application_came = True
        if self._conductor is not None and self._balance is not None:
            self._conductor.worker_at(worker["id"], worker["epoch"])
            self._balance.add(worker["load"], time.monotonic())
            if self._conductor.change is not None:
                self._changed.set()
        if self._workers.version != version:
            await self._notice.give()
        return True

    async def watch_workers(self, token: str, version: int, timeout_s: float) -> tuple[int, dict[str, str]] | None:
        """Attention workers, id to address, once they differ from `version`, or after `timeout_s` seconds.

        After a controller's death only when all had time to be heard of: its callers hang up on those not named.
        None for an ingress of an earlier service of this name.
        """
        if token != self._state.token:
            return None
        await self._notice.until(lambda: self._workers.differ(version, time.monotonic()), timeout_s)
        return self._workers.version, self._workers.addresses()

    def report(self, host_id: str, generation: int, reason: str, token: str | None = None) -> None:
        """A client could not reach a host, or got no answer in time; a worker gives its service's `token`."""
        if self._conductor is not None and token in (None, self._state.token):
            self._conductor.suspected(host_id, generation, reason, time.monotonic())
            self._changed.set()

    def wants(self, name: str) -> bool:
        """False when an expert actor was declared dead, or forgotten: it ends itself then."""
        return self._pool is None or name in self._pool.names

    def tls(self) -> TlsFiles | None:
        """What guards the doors of the hosts, and of others' in their processes."""
        return self._spec.tls

    def residents(self) -> dict[str, tuple[str, int]]:
        """Actors in whose processes another controller's hosts may be guests now, with host id and generation."""
        return residents(self._conductor, self._fleet)

    async def begin_change(self, wish: Mapping[str, Any]) -> dict[str, Any]:
        """Start on a wish, and describe the change; raises ChangeRefused, which says why and what to do."""
        if self._conductor is None or self._stopping:
            raise not_ready(self._reason)
        if self._following is not None and wish["kind"] in ("scale", "drain"):
            raise ChangeRefused(
                "expert hosts follow the nodes here: add nodes, or make room before nodes go "
                "(shoal experts drain --to N, or --node NODE)"
            )
        change = self._conductor.request(Wish.from_plain(wish), time.monotonic())
        self._begun(self._conductor)
        return change.describe()

    async def make_room(self, hosts: int | None, node: str | None) -> dict[str, Any]:
        """See `cluster.room.make_room`. Before the first host of a service there is nothing to make room of."""
        if self._conductor is None and self._state.core is None and not self._stopping:
            return {"done": True, "change": None}
        if self._conductor is None or self._fleet is None or self._stopping:
            raise not_ready(self._reason)
        answer = make_room(self._conductor, self._following, self._fleet.homes(), hosts, node, time.monotonic())
        self._begun(self._conductor)
        return answer

    async def watch_change(self, change_id: str, seen: int, timeout_s: float) -> dict[str, Any] | None:
        """A change as soon as its version differs from `seen`, or after `timeout_s` seconds; None for an unknown id."""
        change = self._conductor.find_change(change_id) if self._conductor is not None else None
        if change is None:
            return None
        await self._notice.until(lambda: change.version != seen, timeout_s)
        return change.describe()

    def events(self, after: int, limit: int) -> list[dict[str, Any]]:
        """What happened after event number `after`, oldest first."""
        return describe_events(self._conductor, after, limit)

    def status(self) -> dict[str, Any]:
        """What `shoal status` prints."""
        return {
            "epoch": self._placement.epoch if self._placement else 0,
            "model": self._spec.model,
            "state": self._state_name(),
            "reason": self._reason or self._waiting or describe_difference(self._conductor),
            "expert_hosts": describe_hosts(self._conductor, self._fleet, self._balance),
            "attention_workers": self._workers.describe(),
            "standby": [{"pid": pid} for pid in self._fleet.standby] if self._fleet is not None else [],
            "controller": {"pid": os.getpid()},
            "nodes": self._following.describe() if self._following is not None else None,
            **describe_service(self._conductor, self._balance),
        }
