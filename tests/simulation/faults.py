"""What goes wrong, and what is asked for, at times that a seed draws."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.change import Wish
from tests.simulation.hosts import HostProcess

if TYPE_CHECKING:
    from tests.simulation.workers import Worker
    from tests.simulation.world import World


class Faults:
    """Draws them over a while, and mends at the end what would not mend itself."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._over = False
        self._at_actions = world.rng.choice((0.0, 0.0, 0.1, 0.3))  # chance of a fault where the controller acts
        self._again = world.rng.choice((0.0, 0.0, 0.7))  # chance of a wish as soon as a change is over
        self._last: Wish | None = None
        world.on_action = self._strike
        world.on_change_over = self._want_again
        self._kinds: tuple[tuple[float, Callable[[], None]], ...] = (
            (3, self._kill_host),
            (3, self._freeze_briefly),
            (3, self._freeze_long),
            (1, self._freeze_for_good),
            (1, self._kill_all_replicas),
            (1, self._kill_two),
            (2, self._kill_worker),
            (2, self._crash_controller),
            (2, self._crash_between_actions),
            (2, self._lose_messages),
            (1, self._double_messages),
            (1, self._delay_messages),
            (1, self._publish_late),
            (2, self._cut_worker_off),
            (2, self._cut_host_off),
            (1, self._fail_load),
            (1, self._fail_start),
            (1, self._load_slowly),
            (1, self._kill_a_source),
            (8, self._change),
            (1, self._change_twice),
            (1, self._hang_up),
        )

    def spread(self, seconds: float) -> None:
        """At least five within so many seconds."""
        world = self._world
        weights, kinds = zip(*self._kinds, strict=True)
        for kind in world.rng.choices(kinds, weights, k=world.rng.randint(5, 11)):
            world.clock.after(world.between(0.0, seconds), partial(self._happen, kind))

    def mend(self) -> None:
        """No more faults: what is frozen, cut off or slow is so no longer, but for what is frozen for good."""
        world = self._world
        self._over = True
        world.note("mended")
        world.weather = type(world.weather)(late=0.0)
        world.start_failures = world.load_failures = 0
        world.pairs_slow = 1.0
        for process in world.processes:
            process.cut_until_s = min(process.cut_until_s, world.clock.now_s)
            process.thaw()
        for worker in world.workers:
            worker.cut_until_s = min(worker.cut_until_s, world.clock.now_s)
            worker.table_delay_s = 0.0
        if not any(worker.alive for worker in world.workers):
            world.add_worker()

    def _strike(self, process: HostProcess | None) -> None:
        """The controller wants something of a process: the worst moment."""
        world = self._world
        if self._over or not world.chance(self._at_actions):
            return
        kind = world.rng.choice(("freeze", "freeze", "kill", "cut", "crash"))
        world.note("strike", kind, process)
        if kind == "crash":
            world.shell.crash(after_actions=world.rng.randint(0, 2))
        elif process is not None and kind == "freeze":
            process.freeze()
            self._later(world.between(0.1, 6.0), process.thaw)
        elif process is not None and kind == "cut":
            process.cut_until_s = world.clock.now_s + world.between(0.2, 3.0)
        elif process is not None:
            self._later(world.between(0.0, 0.05), process.kill)

    def _want_again(self) -> None:
        if not self._over and self._world.chance(self._again):
            wish = self._last if self._world.chance(0.5) else None
            self._later(self._world.between(0.0, 0.1), partial(self._change, wish))

    def _happen(self, kind: Callable[[], None]) -> None:
        self._world.note("fault", getattr(kind, "__name__", "?"))
        kind()

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Also after the end: by then it is mended already."""
        self._world.clock.after(delay_s, lambda: None if self._over else action())

    def _host(self) -> HostProcess | None:
        alive = [process for process in self._world.processes if process.alive]
        return self._world.rng.choice(alive) if alive else None

    def _worker(self) -> "Worker | None":
        alive = [worker for worker in self._world.workers if worker.alive]
        return self._world.rng.choice(alive) if alive else None

    def _kill_host(self) -> None:
        host = self._host()
        if host is not None:
            host.kill()

    def _freeze_briefly(self) -> None:
        host = self._host()
        if host is not None:
            host.freeze()
            self._later(self._world.between(0.2, 1.0), host.thaw)

    def _freeze_long(self) -> None:
        host = self._host()
        if host is not None:
            host.freeze()
            self._later(self._world.between(1.0, 6.0), host.thaw if self._world.chance(0.6) else host.kill)

    def _freeze_for_good(self) -> None:
        host = self._host()
        if host is not None and host.ready:  # that one hangs while it starts is not noticed
            host.freeze(for_good=True)

    def _kill_all_replicas(self) -> None:
        newest = self._world.watch.newest
        if newest is not None:
            layer = self._world.rng.choice(sorted(newest.owners))
            expert = self._world.rng.randrange(len(newest.owners[layer]))
            for host in newest.holders(layer, expert):
                process = self._world.find(host.id, host.generation)
                if process is not None:
                    process.kill()

    def _kill_two(self) -> None:
        alive = [process for process in self._world.processes if process.alive]
        for process in self._world.rng.sample(alive, min(2, len(alive))):
            process.kill()

    def _kill_worker(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.kill()
            self._world.clock.after(self._world.between(0.3, 3.0), self._world.add_worker)

    def _crash_controller(self) -> None:
        self._world.shell.crash()

    def _crash_between_actions(self) -> None:
        self._world.shell.crash(after_actions=self._world.rng.randint(0, 4))

    def _lose_messages(self) -> None:
        self._have_weather(lost=self._world.between(0.02, 0.3))

    def _double_messages(self) -> None:
        self._have_weather(doubled=0.5)

    def _delay_messages(self) -> None:
        self._have_weather(late=self._world.between(0.1, 0.5))

    def _have_weather(self, **chances: float) -> None:
        world = self._world
        before = world.weather
        world.weather = replace(before, **chances)
        self._later(world.between(0.3, 1.5), lambda: setattr(world, "weather", before))

    def _publish_late(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.table_delay_s = self._world.between(0.5, 6.0)
            self._later(self._world.between(1.0, 6.0), lambda: setattr(worker, "table_delay_s", 0.0))

    def _cut_worker_off(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.cut_until_s = self._world.clock.now_s + self._world.between(0.5, 6.0)

    def _cut_host_off(self) -> None:
        host = self._host()
        if host is not None:
            host.cut_until_s = self._world.clock.now_s + self._world.between(0.2, 4.0)

    def _fail_load(self) -> None:
        self._world.load_failures = 1

    def _fail_start(self) -> None:
        self._world.start_failures = 1

    def _load_slowly(self) -> None:
        self._world.pairs_slow = self._world.rng.choice((60.0, 600.0))  # within the deadline of a load, or not
        self._later(self._world.between(2.0, 8.0), lambda: setattr(self._world, "pairs_slow", 1.0))

    def _kill_a_source(self) -> None:
        """In the middle of a change, somebody that is not loading."""
        conductor = self._world.shell.conductor
        if conductor is None or conductor.change is None:
            self._change()
            self._later(self._world.between(0.05, 0.8), self._kill_host)
            return
        idle = [p for p in self._world.processes if p.alive and not p.loading]
        if idle:
            self._world.rng.choice(idle).kill()

    def _change(self, wish: Wish | None = None) -> None:
        self._last = wish or self._wish()
        self._world.shell.request(self._last)

    def _change_twice(self) -> None:
        self._change()
        self._later(self._world.between(0.0, 0.5), self._change)

    def _wish(self) -> Wish:
        rng = self._world.rng
        conductor = self._world.shell.conductor
        members = conductor.committed.members if conductor is not None else ("host-0",)
        kind = rng.choice(("scale", "scale", "follow", "drain", "replicas", "rebalance"))
        if kind == "scale":
            return Wish("scale", hosts=rng.randint(1, 5))
        if kind == "follow":  # hosts leave and others come at once
            leaving = rng.sample(members, rng.randint(0, min(2, len(members))))
            staying = max(1, len(members) - len(leaving))
            return Wish("follow", hosts=rng.randint(staying, max(5, staying)), leaving=tuple(leaving))
        if kind == "drain":
            return Wish("drain", leaving=(rng.choice(members),))
        if kind == "replicas":
            return Wish("replicas", replicas=rng.randint(1, 3), extra=rng.choice((None, 0, 2)))
        self._world.shift_loads()
        return Wish("rebalance")

    def _hang_up(self) -> None:
        open_ = [client for client in self._world.ingress.clients if not client.over]
        if open_:
            self._world.rng.choice(open_).hang_up()
