"""One thread budget a node, a share of its cores for each host, and threads that sleep while they wait.

An idle OpenMP team that spins slows its neighbours by an order of magnitude, and every actor brings one. And where
cores are busy, Linux wakes a thread on the core of whoever woke it or where it ran last, without looking for an idle
one: two hosts that are woken for one layer then compute one after the other on one core. So each keeps to its own.
"""

import contextlib
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")  # of the container
TOPOLOGY = Path("/sys/devices/system/cpu")
PASSES = 5  # over a process's threads, until none was begun meanwhile


@dataclass(frozen=True, slots=True)
class Share:
    """What a host may use of its node: so many threads, on the cores of its place among the node's hosts."""

    threads: int
    place: int
    places: int

    def cores(self, cores: Collection[int]) -> frozenset[int]:
        """Its part of a node's `cores`, whole and neighbouring ones; all of them where it has more threads than that.

        Where there are fewer cores than places, several keep to the same one.
        """
        near = sorted(cores, key=_position)
        first, last = (place * len(near) // self.places for place in (self.place, self.place + 1))
        part = near[first:last] or [near[self.place % len(near)]]
        return frozenset(part if self.threads <= len(part) else near)


def keep_to(cores: Collection[int]) -> None:
    """Run all threads of this process, and those that they begin, on these cores; raises OSError where none is ours."""
    done: set[str] = set()
    for _ in range(PASSES):
        tasks = set(os.listdir("/proc/self/task"))
        if tasks <= done:
            return
        for task in tasks - done:
            try:
                os.sched_setaffinity(int(task), cores)
            except ProcessLookupError:
                continue  # it has ended
        done |= tasks


def _position(core: int) -> tuple[int, int, int]:
    """Package, physical core and number: hardware threads of one core, and cores of one package, are neighbours."""
    try:
        here = TOPOLOGY / f"cpu{core}" / "topology"
        return int((here / "physical_package_id").read_text()), int((here / "core_id").read_text()), core
    except (OSError, ValueError):
        return 0, core, core


def node_threads() -> int:
    """Cores this process may use: those that it may run on, or fewer where its container has a quota of less."""
    cores = len(os.sched_getaffinity(0))
    return max(1, int(min(cores, _quota())))


def _quota() -> float:
    """Cores' worth of time that the container of this process gets, as control groups of version 2 or 1 have it."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((CONTROL_GROUP / file).read_text() for file in files).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
    return math.inf


def host_threads(hosts: int, nodes: int, cores: int) -> int:
    """Threads of each of `hosts` expert hosts that are spread over `nodes` of `cores` each: they compute together."""
    return max(1, cores // -(-hosts // nodes))


def settle_threads(threads: int) -> None:
    """Give this process the environment of `threads` threads, before it imports what computes: OpenMP reads it once.

    An actor does it to itself: for a runtime environment Ray runs one more interpreter, which imports Ray, before it
    starts the actor's. Raises what `thread_environment` raises.
    """
    os.environ.update(thread_environment(threads))


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes with `threads` threads; raises ValueError below 1."""
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "GOMP_SPINCOUNT": "0",
    }
