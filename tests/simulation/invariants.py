"""What must hold all along, and when everything is at rest."""

from typing import TYPE_CHECKING

from attention.requests import Update
from cluster.change import Change, Phase
from cluster.conductor import Conductor
from cluster.saved import Committed
from experts.errors import HostRefused
from experts.messages import ForwardRequest
from router.holding import Pair
from router.placement import Host, Placement
from tests.simulation.clock import Violation
from tests.simulation.hosts import HostProcess

if TYPE_CHECKING:
    from tests.simulation.workers import Client, Worker
    from tests.simulation.world import World

EXCUSED_S = 3.5  # after a partition, until the controller has heard again where a worker is


class Watch:
    """Told of everything that happens; raises Violation."""

    def __init__(self, world: "World", may_fail: bool) -> None:
        """`may_fail`: requests may end with an error that says that experts are unavailable."""
        self._world = world
        self._may_fail = may_fail
        self._tables: dict[int, Placement] = {}
        self._started: set[tuple[str, int]] = set()
        self._left: set[str] = set()
        self._overdue = False
        self._before: tuple[Committed, Change | None] | None = None
        self.unheld = 0  # requests refused since their pairs were dropped

    @property
    def newest(self) -> Placement | None:
        return self._tables[max(self._tables)] if self._tables else None

    def started(self, host_id: str, generation: int) -> None:
        last = max((number for known, number in self._started if known == host_id), default=0)
        if generation <= last:
            raise Violation(f"{host_id} was started in generation {generation} after {last}")
        self._started.add((host_id, generation))

    def published(self, placement: Placement) -> None:
        if self._tables and placement.epoch <= max(self._tables):
            raise Violation(f"epoch {placement.epoch} was published after {max(self._tables)}")
        self._tables[placement.epoch] = placement
        self._world.note("publish", placement.epoch, *(f"{h.id}/{h.generation}" for h in placement.hosts))
        for host in placement.hosts:
            process = self._world.find(host.id, host.generation)
            if process is None:
                raise Violation(f"epoch {placement.epoch} names {host}, which was never started")
            lacking = frozenset(placement.held_by(host.id)) - process.held
            if process.alive and lacking:
                raise Violation(f"epoch {placement.epoch} says that {process} holds {sorted(lacking)}")

    def table_seen(self, worker: "Worker", placement: Placement) -> None:
        if placement.epoch <= worker.placements.epoch:
            raise Violation(f"{worker} has epoch {worker.placements.epoch} and took {placement.epoch}")
        if self._tables.get(placement.epoch) != placement:
            raise Violation(f"epoch {placement.epoch} has two tables")

    def sent(self, worker: "Worker", host: Host, request: ForwardRequest) -> None:
        if request.epoch < worker.told_epoch:
            raise Violation(f"{worker} said that it uses {worker.told_epoch} and asked {host} by {request.epoch}")

    def refused(self, process: HostProcess, request: ForwardRequest, refusal: HostRefused) -> None:
        self._world.note("refusal", process, refusal.code)
        if not refusal.may_pass:
            raise Violation(f"{process} refused a request: {refusal}")
        if refusal.code == "not_held":
            self.unheld += 1
            newest = self.newest
            assert newest is not None
            if request.epoch >= newest.epoch:
                raise Violation(f"{process} was asked by the newest table, {newest.epoch}: {refusal}")

    def before(self, conductor: Conductor) -> None:
        """The conductor is about to be asked what to do."""
        change = conductor.change
        late = change is not None and self._world.clock.now_s >= change.deadline_s
        self._overdue = change is not None and change.phase is Phase.RETIRE and late
        self._before = (conductor.committed, change)

    def after(self, conductor: Conductor) -> None:
        """The conductor has decided."""
        assert self._before is not None
        committed, change = self._before
        if conductor.committed is not committed:
            if change is None or change.phase not in (Phase.RETIRE, Phase.DONE):
                raise Violation(f"what is committed changed in phase {change and change.phase}")
            self._committed(conductor.committed, change)
        if change is not None and change.phase is Phase.ROLLED_BACK and conductor.committed is not committed:
            raise Violation(f"{change.id} was rolled back and committed")

    def _committed(self, committed: Committed, change: Change) -> None:
        wish = change.wish
        if set(change.leaving) & set(committed.members) or not set(change.joining) <= set(committed.members):
            raise Violation(f"{change.id} has members {committed.members}")
        if wish.hosts is not None and len(committed.members) != wish.hosts:
            raise Violation(f"{change.id} wanted {wish.hosts} hosts and has {committed.members}")
        conductor = self._world.shell.conductor
        assert conductor is not None
        for host_id in committed.members:
            view = conductor.roster.views[host_id]
            process = self._world.find(host_id, view.generation)
            if process is None or (process.alive and not committed.holding.held_by(host_id) <= process.held):
                raise Violation(f"{change.id} was committed before {process} held what it should")

    def retiring(self, process: HostProcess, pairs: frozenset[Pair]) -> None:
        """A host will be told to drop pairs."""
        if not pairs:
            raise Violation(f"{process} shall drop nothing")
        self._check_unused(process, pairs, "shall drop what")

    def stopping(self, process: HostProcess, insist: bool) -> None:
        """A life will be told to end."""
        if not insist and not self._declared_dead(process):
            self._check_unnamed(process, None)
            self._check_unused(process, None, "shall stop, which")

    def ending(self, process: HostProcess) -> None:
        """A life ends itself, since the controller does not want it."""
        if not self._declared_dead(process):
            self._check_unnamed(process, None)

    def dropping(self, process: HostProcess, pairs: frozenset[Pair]) -> None:
        """A host drops pairs."""
        self._check_unnamed(process, pairs)

    def left(self, worker_id: str) -> None:
        self._left.add(worker_id)

    def returned(self, worker_id: str) -> None:
        self._left.discard(worker_id)

    def answered(self, client: "Client", news: Update) -> None:
        """A client got an update; its answer so far must be the beginning of the expected one."""
        got, expected = client.got, client.expected
        self._world.note("got", client, *news.token_ids, news.finish_reason)
        if news.error is not None:
            if self._may_fail and "no host answered for experts" in news.error:
                return
            raise Violation(f"{client} failed: {news.error}")
        for name, has, wanted in (
            ("tokens", got.tokens, expected.tokens),
            ("logprobs", got.logprobs, expected.logprobs),
            ("prompt_logprobs", got.prompt_logprobs, expected.prompt_logprobs),
        ):
            if has != wanted[: len(has)] or (got.finish_reason is not None and has != wanted):
                raise Violation(f"{client} got {name} {has}; expected {wanted}")
        if got.finish_reason is not None and got.finish_reason != expected.finish_reason:
            raise Violation(f"{client} ended with {got.finish_reason}; expected {expected.finish_reason}")

    def unrest(self) -> str | None:
        """What is not at rest yet."""
        world = self._world
        conductor = world.shell.conductor
        if conductor is None or not world.shell.up:
            return "the controller is away"
        if conductor.change is not None:
            return f"{conductor.change.id} is in phase {conductor.change.phase}"
        for client in world.ingress.clients:
            if not client.over:
                return f"{client} is not answered"
        alive = {(p.id, p.generation): p for p in world.processes if p.alive and not self._beyond_reach(p)}
        members = {(h, conductor.roster.views[h].generation) for h in conductor.committed.members}
        if alive.keys() != members:
            return f"processes are {sorted(alive)}; members are {sorted(members)}"
        if not all(process.ready for process in alive.values()):
            return "some process still loads"
        for process in alive.values():
            if process.held != conductor.committed.holding.held_by(process.id):
                return f"{process} holds {sorted(process.held)}; not what is committed"
            if process.loading or process.frozen:
                return f"{process} still loads, or is frozen"
        newest = self.newest
        if newest is None or conductor.placement != newest:
            return "the newest table is not what the controller has"
        named = {host_id: frozenset(newest.held_by(host_id)) for host_id in (host.id for host in newest.hosts)}
        if named != {process.id: process.held for process in alive.values()}:
            return "the newest table is not what hosts hold"
        for worker in world.workers:
            if worker.alive:
                stats = worker.engine.stats()
                if worker.engine.has_work or worker.stepping or stats.running or stats.waiting:
                    return f"{worker} has work"
                if stats.blocks_owned:
                    return f"{worker} owns {stats.blocks_owned} blocks"
                if worker.wire.open:
                    return f"{worker} has {len(worker.wire.open)} open calls"
                if worker.placements.epoch != newest.epoch:
                    return f"{worker} uses epoch {worker.placements.epoch} of {newest.epoch}"
        return None

    def frozen_members(self) -> bool:
        """Whether somebody who is asked could notice that a host is frozen."""
        newest = self.newest
        processes = self._world.processes
        return newest is not None and any(p.alive and p.frozen and p.name in newest.hosts for p in processes)

    def _beyond_reach(self, process: HostProcess) -> bool:
        """Frozen for good, in a life that an earlier controller declared dead: it ends itself if ever it thaws."""
        conductor = self._world.shell.conductor
        last = conductor.roster.generations.get(process.id, 0) if conductor is not None else 0
        forgotten = self._world.shell.crashed and process.generation < last
        return forgotten and process.for_good and process.frozen

    def _declared_dead(self, process: HostProcess) -> bool:
        conductor = self._world.shell.conductor
        view = conductor.roster.views.get(process.id) if conductor is not None else None
        later = view is not None and view.generation > process.generation
        return later or (view is not None and view.generation == process.generation and view.state == "dead")

    def _check_unnamed(self, process: HostProcess, pairs: frozenset[Pair] | None) -> None:
        newest = self.newest
        if newest is not None and _names(newest, process, pairs):
            raise Violation(f"{process} ends or drops {pairs and sorted(pairs)}, which epoch {newest.epoch} names")

    def _check_unused(self, process: HostProcess, pairs: frozenset[Pair] | None, what: str) -> None:
        """No worker that could have moved in time still uses a table that names this."""
        for worker in self._world.workers:
            excused = not worker.heard or worker.cut_until_s > self._world.clock.now_s - EXCUSED_S
            if self._overdue or excused or not worker.alive or worker.id in self._left:
                continue
            table = self._tables.get(worker.epoch_in_use)
            if table is not None and _names(table, process, pairs):
                raise Violation(f"{process} {what} {worker} uses, in epoch {table.epoch}")


def _names(table: Placement, process: HostProcess, pairs: frozenset[Pair] | None) -> bool:
    """Whether a table names a life, for some of the pairs where there are any."""
    if process.name not in table.hosts:
        return False
    held = frozenset(table.held_by(process.id))
    return bool(held if pairs is None else held & pairs)
