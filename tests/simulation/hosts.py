"""Expert hosts as processes: one life each, which computes, loads, freezes, thaws and dies."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from cluster.roster import HostReport
from experts.errors import HostRefused
from experts.host import ExpertHost
from experts.messages import ForwardReply, ForwardRequest
from model.checkpoint import ExpertWeights
from router.holding import Pair
from router.placement import Host
from tests.simulation.reference import InMemory

if TYPE_CHECKING:
    from tests.simulation.world import World

ORPHAN_CHECK_S = 5.0
Answered = Callable[[ForwardReply | HostRefused], None]
Done = Callable[[str | None], None]  # the reason of a failure


class HostProcess:
    """One life of a host."""

    def __init__(self, world: "World", host_id: str, generation: int) -> None:
        self._world = world
        self.id = host_id
        self.generation = generation
        self.host = ExpertHost(world.reference.checkpoint.config, host_id, generation)
        self.ready = False
        self.alive = True
        self.frozen = False
        self.for_good = False  # nothing but its end ends this
        self.closing = False  # its door is shut
        self.doomed = False  # was told to end while frozen
        self.cut_until_s = 0.0  # nothing passes between it and the controller before
        self.loading: dict[str, list[Pair]] = {}  # what each change still loads here
        self._held_up: list[Callable[[], None]] = []
        self._free_s = 0.0

    def __repr__(self) -> str:
        return f"{self.id}/{self.generation}"

    @property
    def name(self) -> Host:
        return Host(self.id, self.generation, self._world.address_of(self.id, self.generation))

    @property
    def held(self) -> frozenset[Pair]:
        return frozenset(self.host.held)

    def report(self) -> HostReport:
        return HostReport(self.id, self.generation, self.name.address, self.held, max_pairs=self._world.max_pairs)

    def run(self, work: Callable[[], None]) -> None:
        """Do it now, or once thawed; never, if it is dead."""
        if self.frozen:
            self._held_up.append(work)
        elif self.alive:
            work()

    def later(self, delay_s: float, work: Callable[[], None]) -> None:
        self._world.clock.after(delay_s, lambda: self.run(work))

    def freeze(self, for_good: bool = False) -> None:
        if self.alive:
            self._world.note("freeze", self)
            self.frozen = True
            self.for_good = for_good

    def thaw(self) -> None:
        """Go on, beginning with everything that came meanwhile."""
        if not self.frozen or self.for_good:
            return
        self._world.note("thaw", self)
        self.frozen = False
        held_up, self._held_up = self._held_up, []
        for place, work in enumerate(held_up):
            self.later(0.001 * place, work)
        if self.doomed:
            self.later(self._world.between(0.0, 0.02), self.kill)

    def kill(self) -> None:
        if self.alive:
            self._world.note("killed", self)
            self.alive = self.frozen = False
            self._held_up.clear()
            self._world.host_ended(self)

    def end(self) -> None:
        """Told to die by the cluster, which a process does not hear while it is frozen."""
        if self.frozen and not self.for_good:
            self.doomed = True
        else:
            self.kill()

    def close(self) -> None:
        """Shut the door, finish what is being computed, exit."""
        if not self.closing:
            self.closing = True
            self.later(0.05 + max(0.0, self._free_s - self._world.clock.now_s), self.kill)

    def start(self, pairs: frozenset[Pair], progress: Callable[[int], None], done: Done) -> None:
        """Load the first pairs from disk and open the door."""
        world = self._world
        fails = world.take_start_failure()

        def load(loaded: int) -> None:
            progress(loaded)
            if loaded < len(pairs):
                self.later(world.pair_s(), partial(load, loaded + 1))
                return
            if fails:
                done("the checkpoint cannot be read")
                return
            self.host.load(InMemory(world.reference.weights), sorted(pairs))  # type: ignore[arg-type]
            self.ready = True
            done(None)

        self.later(world.between(0.1, 0.6), partial(load, 0))
        self._check_orphan()

    def take(
        self,
        change_id: str,
        pairs: frozenset[Pair],
        sources: Mapping[Pair, Host],
        progress: Callable[[int], None],
        done: Done,
    ) -> None:
        """Hold further pairs, all of them or none."""
        self.loading[change_id] = sorted(pairs)
        staged: dict[Pair, ExpertWeights] = {}
        fails = self._world.take_load_failure()

        def next_pair() -> None:
            left = self.loading.get(change_id)
            if left is None:
                done("abandoned")
            elif fails and len(staged) >= len(pairs) // 2:
                del self.loading[change_id]
                done("the disk cannot be read")
            elif left:
                pair = left.pop(0)
                staged[pair] = self._fetch(pair, sources.get(pair))
                progress(len(staged))
                self.later(self._world.pair_s(), next_pair)
            else:
                del self.loading[change_id]
                self.host.load(InMemory(staged), sorted(pairs))  # type: ignore[arg-type]
                self._world.note("took", self, len(pairs))
                done(None)

        self.later(self._world.pair_s(), next_pair)

    def abandon(self, change_id: str) -> None:
        self.loading.pop(change_id, None)

    def settle(self) -> HostReport | None:
        """End what an earlier controller began; what is held then. None before the door is open."""
        self.loading.clear()
        return self.report() if self.ready else None

    def drop(self, pairs: frozenset[Pair], done: Callable[[], None]) -> None:
        dropped = pairs & self.held
        self._world.watch.dropping(self, dropped)
        self.host.unload(sorted(dropped))
        self._world.note("dropped", self, len(dropped))
        done()

    def compute(self, request: ForwardRequest, answer: Answered) -> None:
        """One request after the other."""
        self.run(partial(self._queue, request, answer))

    def _queue(self, request: ForwardRequest, answer: Answered) -> None:
        now_s = self._world.clock.now_s
        self._free_s = max(now_s, self._free_s) + self._world.between(0.001, 0.01)
        self.later(self._free_s - now_s, partial(self._forward, request, answer))

    def _forward(self, request: ForwardRequest, answer: Answered) -> None:
        try:
            answer(self.host.forward(request))
        except HostRefused as refusal:
            self._world.watch.refused(self, request, refusal)
            answer(refusal)

    def _fetch(self, pair: Pair, source: Host | None) -> ExpertWeights:
        """From a living holder's memory, else from disk."""
        process = None if source is None else self._world.find(source.id, source.generation)
        if process is None or not process.alive or process.frozen or pair not in process.held:
            return self._world.reference.weights[pair]
        layer, expert = pair
        return ExpertWeights(*process.host._layers[layer].unpack(expert))

    def _check_orphan(self) -> None:
        """End oneself when the controller does not want this life."""
        if not self.alive:
            return
        self.later(ORPHAN_CHECK_S, self._check_orphan)
        heard = self.cut_until_s <= self._world.clock.now_s
        if heard and not self._world.shell.wants(self.id, self.generation):
            self._world.watch.ending(self)
            self.kill()
