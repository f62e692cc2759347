"""One seed from its beginning to rest."""

import hashlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.simulation.clock import Violation
from tests.simulation.faults import Faults
from tests.simulation.reference import Reference
from tests.simulation.world import World

FAULTS_S = 9.0
REST_S = 120.0  # after the last fault
LOOK_S = 0.25
STAY_S = 1.0  # at rest, to see that it stays so


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a seed went."""

    seed: int
    failure: str | None
    digest: str  # of the trace
    trace: tuple[tuple[object, ...], ...]
    virtual_s: float

    def lines(self) -> list[str]:
        """The trace for people."""
        return [f"{at_s:9.3f}  {' '.join(map(str, what))}" for at_s, *what in self.trace]  # type: ignore[str-format]


def simulate(seed: int, references: Sequence[Reference], deadline_s: float | None = None) -> Outcome:
    """Run a seed; with `deadline_s` the hosts' clients give up so soon, and requests may fail cleanly."""
    world = World(seed, references, deadline_s)
    failure: str | None = None
    try:
        with torch.inference_mode():
            _run(world)
    except Violation as violation:
        failure = str(violation)
    except Exception:  # noqa: BLE001  # whatever the code under test raises is what was looked for
        failure = traceback.format_exc()
    digest = hashlib.blake2b(repr(world.trace).encode(), digest_size=16).hexdigest()
    return Outcome(seed, failure, digest, tuple(world.trace), world.clock.now_s)


def _run(world: World) -> None:
    world.run_until_ready()
    faults = Faults(world)
    faults.spread(FAULTS_S)
    world.ask_over(FAULTS_S)
    world.clock.run_until(world.clock.now_s + FAULTS_S)
    faults.mend()
    _come_to_rest(world)


def _come_to_rest(world: World) -> None:
    until_s = world.clock.now_s + REST_S
    since_s = None
    while since_s is None or world.clock.now_s < since_s + STAY_S:
        left = world.watch.unrest()
        if left is not None and world.clock.now_s > until_s:
            raise Violation(f"not at rest {REST_S:.0f} s after the last fault: {left}")
        if world.watch.frozen_members() and world.chance(0.3):
            world.ask()  # that a host is frozen is noticed by whoever asks it
        since_s = None if left is not None else since_s or world.clock.now_s
        world.clock.run_until(world.clock.now_s + LOOK_S)
