"""Attention workers, and the ingress that replays the requests of those that die."""

import copy
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attention.engine import Engine, EngineLimits
from attention.replay import Replay
from attention.requests import GenerateRequest, Update
from attention.scheduler import SchedulerLimits
from experts.client import ExpertClient
from router.placement import Host, Placement
from tests.serving import Answer
from tests.simulation.network import Wire, WorkerKilled

if TYPE_CHECKING:
    from tests.simulation.world import World

HEARTBEAT_S = 1.0
REPLY_TIMEOUT_S = 2.0
ASKING_S = 1e-3  # for the newest placement


class Follower:
    """A worker's copy of the placement."""

    def __init__(self, world: "World", worker: "Worker") -> None:
        self._world = world
        self._worker = worker
        self.placement: Placement | None = None
        self.begun = 0  # epoch that the step under way uses

    @property
    def epoch(self) -> int:
        return self.placement.epoch if self.placement is not None else 0

    def snapshot(self) -> Placement:
        assert self.placement is not None
        return self.placement

    def names(self, host: Host) -> bool:
        return self.placement is not None and host in self.placement.hosts

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        self._worker.wire.wait(ASKING_S, lambda: False)  # asking takes time, so that no loop is endless
        self._worker.wire.wait(timeout_s, lambda: self.epoch > epoch)
        self.begun = self.epoch
        return self.snapshot()

    def report(self, host: Host, reason: str) -> None:
        self._world.shell.tell_from(self._worker, lambda shell: shell.suspected(host.id, host.generation, reason))

    def hear(self, placement: Placement) -> None:
        """A table came, perhaps after a newer one."""
        if placement.epoch > self.epoch:
            self._world.watch.table_seen(self._worker, placement)
            self.placement = placement


class Worker:
    """One process: steps while it has work, beats once a second."""

    def __init__(self, world: "World", worker_id: str) -> None:
        self._world = world
        self.id = worker_id
        self.alive = True
        self.cut_until_s = 0.0  # nothing passes between it and the controller before
        self.table_delay_s = 0.0  # by which tables come late
        self.heard = False  # by a controller, at any time
        self.told_epoch = 0  # the last epoch that a heartbeat named
        self.placements = Follower(world, self)
        self.wire = Wire(world, self)
        client = ExpertClient(
            self.wire, self.placements, world.deadline_s, reply_timeout_s=REPLY_TIMEOUT_S, clock=world.clock.now
        )
        decoder = copy.copy(world.reference.decoder)
        decoder._experts, decoder._placements, decoder._halve_from = client, self.placements, world.halve_from
        self.client = client
        self.engine = Engine(decoder, world.engine_limits())
        self.stepping = False
        self._due = False
        self._commands: deque[Callable[[], None]] = deque()
        self._attempts: dict[str, tuple[Client, int]] = {}
        self._sent_s = 0.0  # when the last updates arrive
        self._beat()

    def __repr__(self) -> str:
        return self.id

    @property
    def epoch_in_use(self) -> int:
        """No older table is used here, or will be."""
        newest = self.placements.epoch
        return self.placements.begun if self.stepping else newest

    def submit(self, request: GenerateRequest, client: "Client", attempt: int) -> None:
        def begin() -> None:
            self._attempts[request.id] = (client, attempt)
            self.engine.submit(request)

        self._command(begin)

    def cancel(self, request_id: str) -> None:
        def end() -> None:
            self._attempts.pop(request_id, None)
            self.engine.cancel(request_id)

        self._command(end)

    def kill(self) -> None:
        if self.alive:
            self._world.note("worker_killed", self)
            self.alive = False
            self._world.clock.after(self._world.between(0.01, 0.3), partial(self._world.ingress.lost, self))

    def poll(self) -> None:
        """Ask the controller for a newer table."""
        placement = self._world.shell.placement_for(self)
        if placement is not None and placement.epoch > self.placements.epoch:
            self._world.clock.after(
                self._world.between(0.005, 0.05) + self.table_delay_s, partial(self._hear, placement)
            )

    def _hear(self, placement: Placement) -> None:
        if self.alive:
            first = self.placements.placement is None
            self.placements.hear(placement)
            self._greet()  # who moved says so at once
            if first:
                self._world.ingress.arrived(self)

    def _beat(self) -> None:
        if self.alive:
            self._world.clock.after(HEARTBEAT_S, self._beat)
            self._greet()
            self.poll()

    def _greet(self) -> None:
        epoch = self.epoch_in_use
        self.told_epoch = max(epoch, self.told_epoch)
        self._world.shell.tell_from(self, lambda shell: shell.heartbeat(self, epoch))

    def _command(self, command: Callable[[], None]) -> None:
        if self.alive:
            self._commands.append(command)
            self._wake()

    def _wake(self) -> None:
        if not self._due and not self.stepping:
            self._due = True
            self._world.clock.after(self._world.step_s(), self._step)

    def _step(self) -> None:
        self._due = False
        if not self.alive:
            return
        while self._commands:
            self._commands.popleft()()
        self.stepping = True
        self.placements.begun = self.placements.epoch
        try:
            updates = self.engine.step()
        except WorkerKilled:
            return
        finally:
            self.stepping = False
        if updates:
            self._send([(*self._attempts[update.id], update) for update in updates if update.id in self._attempts])
        if self._commands or self.engine.has_work:
            self._wake()

    def _send(self, updates: list[tuple["Client", int, Update]]) -> None:
        now_s = self._world.clock.now_s
        self._sent_s = max(self._sent_s, now_s + self._world.between(0.002, 0.05))

        def deliver() -> None:
            for client, attempt, update in updates:
                client.take(attempt, update)

        self._world.clock.after(self._sent_s - now_s, deliver)


class Client:
    """Somebody who asked, and what he got."""

    def __init__(self, world: "World", request: GenerateRequest, expected: Answer) -> None:
        self._world = world
        self.request = request
        self.expected = expected
        self.got = Answer()
        self.worker: Worker | None = None
        self.hung_up = False
        self._replay = Replay(request)
        self._attempt = 0

    def __repr__(self) -> str:
        return f"request {self.request.id}"

    @property
    def over(self) -> bool:
        return self.hung_up or self.got.finish_reason is not None

    def begin(self, worker: Worker) -> None:
        """Ask a worker for what is still to come."""
        self.worker = worker
        self._attempt += 1
        attempt = self._attempt
        request = self._replay.begin()
        self._world.note("ask", self, worker, len(request.resumed_ids))
        self._world.clock.after(
            self._world.between(0.002, 0.05), lambda: None if self.over else worker.submit(request, self, attempt)
        )

    def take(self, attempt: int, update: Update) -> None:
        if self.worker is not None and attempt == self._attempt and not self.hung_up:
            news = self._replay.take(update)
            self.got.add(news)
            self._world.watch.answered(self, news)

    def lost(self) -> None:
        """The worker is gone: what it sent and is still on the way will not come."""
        self.worker = None

    def hang_up(self) -> None:
        if not self.over:
            self._world.note("hang_up", self)
            self.hung_up = True
            if self.worker is not None:
                worker = self.worker
                self._world.clock.after(self._world.between(0.06, 0.1), lambda: worker.cancel(self.request.id))


class Ingress:
    """Chooses workers for requests."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.clients: list[Client] = []
        self._ready: list[Worker] = []
        self._waiting: list[Client] = []

    def ask(self, request: GenerateRequest, expected: Answer) -> None:
        client = Client(self._world, request, expected)
        self.clients.append(client)
        self._place(client)

    def arrived(self, worker: Worker) -> None:
        self._ready.append(worker)
        waiting, self._waiting = self._waiting, []
        for client in waiting:
            self._place(client)

    def lost(self, worker: Worker) -> None:
        """A worker's stream broke."""
        if worker in self._ready:
            self._ready.remove(worker)
        for client in self.clients:
            if client.worker is worker and not client.over:
                client.lost()
                self._place(client)

    def _place(self, client: Client) -> None:
        if client.over:
            return
        if self._ready:
            client.begin(self._world.rng.choice(self._ready))
        else:
            self._waiting.append(client)


def engine_limits(blocks: int, step_tokens: int, running: int) -> EngineLimits:
    """Small enough that sequences are cut into chunks, and give way to each other."""
    return EngineLimits(cache_blocks=blocks, block_size=4, scheduler=SchedulerLimits(step_tokens, running))
