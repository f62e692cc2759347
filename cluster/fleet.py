"""The one place that makes Ray calls about expert actors. Does what the conductor wants, and tells it how it went."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError, RayTaskError

from cluster.actions import Abandon, Load, Probe, Retire, StartHost, StopHost
from cluster.conductor import Conductor
from cluster.life import Life, reason_of, settled
from cluster.nodes import living_nodes, shared_threads
from cluster.pool import Pool
from cluster.spec import ServiceSpec
from cluster.threads import Share
from model.checkpoint import Stamps

STOP_TIMEOUT_S = 5.0
PROGRESS_TIMEOUT_S = 1.0
log = logging.getLogger("shoal.fleet")


class Fleet:
    """Expert actors by host id and generation."""

    def __init__(
        self,
        spec: ServiceSpec,
        pool: Pool,
        stamps: Mapping[str, Stamps],
        conductor: Conductor,
        changed: asyncio.Event,
    ) -> None:
        """`changed` is set whenever the conductor was told something."""
        self._spec = spec
        self._pool = pool
        self._conductor = conductor
        self._changed = changed
        self.lives: dict[tuple[str, int], Life] = {}
        self.stamps = dict(stamps)  # of the checkpoint's files, by node
        self._sharing = 0  # hosts between which the nodes' cores are divided
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, host_id: str, generation: int) -> Life | None:
        return self.lives.get((host_id, generation))

    def homes(self) -> dict[str, str | None]:
        """The node of each member, the oldest first; None between two lives, or until Ray finds one."""
        members, views = self._conductor.committed.members, self._conductor.roster.views
        lives = {host_id: self.find(host_id, views[host_id].generation) for host_id in members}
        return {host_id: life.process.node if life is not None else None for host_id, life in lives.items()}

    def carry_out(self, action: StartHost | Load | Abandon | Retire | StopHost | Probe) -> None:
        """Begin an action; its outcome is told later."""
        if isinstance(action, StartHost):
            self._start(action)
            return
        life = self.find(action.host_id, action.generation)
        if isinstance(action, StopHost):
            if life is not None:
                self._spawn(self._end(life, action.insist))
        elif life is None:
            self._conductor.host_died(action.host_id, action.generation, "its actor is not there", time.monotonic())
        elif isinstance(action, Load):
            self._spawn(self._load(life, action))
        elif isinstance(action, Abandon):
            life.actor.abandon.remote(action.change_id)
        elif isinstance(action, Retire):
            self._spawn(self._retire(life, action))
        else:
            self._spawn(self._probe(life))

    async def adopt(self, names: Sequence[str]) -> None:
        """Take over the lives that an earlier controller left; actors that do not serve are ended."""
        await asyncio.gather(*(self._adopt(name) for name in names))

    async def refresh_progress(self) -> None:
        """Ask hosts that are loading how far they are."""
        asked = [
            self._ask_progress(life) for life in self.lives.values() if life.info is None or life.taking is not None
        ]
        await asyncio.gather(*asked)

    def share_cores(self, hosts: int) -> None:
        """Divide the nodes' cores between so many hosts, now and whenever one has ended."""
        self._sharing = hosts
        threads = self._threads(hosts)
        ready = sorted(
            (life for life in self.lives.values() if life.info is not None),
            key=lambda life: (life.process.node or "", life.host_id, life.generation),
        )
        for _, group in itertools.groupby(ready, key=lambda life: life.process.node):
            lives = list(group)
            for place, life in enumerate(lives):
                share = Share(threads, place, len(lives))
                if life.share != share:
                    life.share = share
                    self._spawn(life.tell_share())

    def keep_standby(self) -> None:
        """See to it that a process waits for the next life."""
        self._pool.keep_standby(lambda: self._threads(len(self._conductor.roster.views)))

    @property
    def standby(self) -> list[int]:
        """Process ids of the stand-bys."""
        return self._pool.standby

    async def stop(self) -> None:
        """End every actor: ask first, then insist."""
        for task in self._tasks:
            task.cancel()
        lives = list(self.lives.values())
        await asyncio.gather(*(self._end(life) for life in lives))
        self._pool.stop()

    def _threads(self, hosts: int) -> int:
        return self._spec.threads or shared_threads(max(1, hosts), living_nodes(self._spec.node_resource))

    def _start(self, action: StartHost) -> None:
        threads = self._threads(len(self._conductor.roster.views))
        life = Life(action.host_id, action.generation, self._pool.take(threads))
        self.lives[action.host_id, action.generation] = life
        self._spawn(self._live(life, action, threads))

    async def _adopt(self, name: str) -> None:
        process = self._pool.find(name)
        if process is None:
            return
        try:
            info = await settled(process.actor)
        except (TimeoutError, RayError):
            self._pool.end(process)
            return
        report, process.node = info.report, info.node
        life = self.lives[report.host_id, report.generation] = Life(
            report.host_id, report.generation, process, info=info
        )
        self._conductor.host_ready(report, time.monotonic())
        self._spawn(self._watch(life))

    async def _live(self, life: Life, action: StartHost, threads: int) -> None:
        try:
            info = await life.actor.begin.remote(life.host_id, life.generation, action.pairs, threads, self.stamps)
        except RayTaskError as error:  # it said why: the checkpoint is at fault, not the host
            self._conductor.host_failed(life.host_id, life.generation, reason_of(error), time.monotonic())
            self._gone(life)
            return
        except RayError as error:  # also one of an actor whose node went before it was there
            self._died(life, reason_of(error))
            return
        life.info, life.process.node = info, info.node
        self.stamps.setdefault(info.node, info.stamps)
        life.progress = (len(info.report.held), len(info.report.held))
        self._conductor.host_ready(info.report, time.monotonic())
        self._changed.set()
        await self._watch(life)

    async def _watch(self, life: Life) -> None:
        reason = "it was told to stop"
        try:
            await life.actor.wait_for_end.remote()
        except RayError as error:
            reason = reason_of(error)
        self._died(life, reason)

    def _died(self, life: Life, reason: str) -> None:
        self._conductor.host_died(life.host_id, life.generation, reason, time.monotonic())
        self._gone(life)

    def _gone(self, life: Life) -> None:
        self._pool.end(life.process)
        self.lives.pop((life.host_id, life.generation), None)
        if self._sharing:
            self.share_cores(self._sharing)
        self._changed.set()

    async def _load(self, life: Life, action: Load) -> None:
        life.taking = action.change_id
        try:
            info, from_hosts, from_disk = await life.actor.take.remote(
                action.change_id, action.pairs, dict(action.sources)
            )
        except RayTaskError as error:
            now_s = time.monotonic()
            self._conductor.load_failed(action.change_id, life.host_id, life.generation, reason_of(error), now_s)
        except RayError as error:  # whoever watches it may have told already
            self._died(life, reason_of(error))
        else:
            life.info = info
            log.info("%s took %d pairs from hosts, %d from disk", life.host_id, from_hosts, from_disk)
            self._conductor.loaded(action.change_id, life.host_id, life.generation, action.pairs)
        finally:
            if life.taking == action.change_id:  # the next change may have begun while this one's load was undone
                life.taking = None
            self._changed.set()

    async def _retire(self, life: Life, action: Retire) -> None:
        try:
            life.info = await life.actor.drop.remote(action.pairs)
        except RayError as error:
            log.warning("%s did not drop what it should: %s", life.host_id, reason_of(error))
            self._conductor.retired(life.host_id, life.generation, frozenset())
            return  # it is asked again with the next tick
        self._conductor.retired(life.host_id, life.generation, action.pairs)
        self._changed.set()

    async def _probe(self, life: Life) -> None:
        alive = await life.answers()
        self._conductor.probed(life.host_id, life.generation, alive, time.monotonic())
        self._changed.set()

    async def _end(self, life: Life, insist: bool = False) -> None:
        if not insist:
            try:
                await asyncio.wait_for(life.actor.stop.remote(), STOP_TIMEOUT_S)
            except TimeoutError:
                insist = True
            except RayError:
                pass  # it has ended, or ends now
        self._pool.end(life.process)
        if insist and life.info is not None:
            await self._pool.insist(life.process, life.info)

    async def _ask_progress(self, life: Life) -> None:
        with contextlib.suppress(TimeoutError, RayError):  # of a death, whoever began it tells
            if life.info is None:
                life.progress = await asyncio.wait_for(life.actor.progress.remote(), PROGRESS_TIMEOUT_S)
                self._conductor.host_progress(life.host_id, life.generation, life.progress[0], time.monotonic())
            elif life.taking is not None:
                change_id = life.taking
                taken = await asyncio.wait_for(life.actor.taken.remote(change_id), PROGRESS_TIMEOUT_S)
                self._conductor.load_progress(change_id, life.host_id, taken, time.monotonic())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
