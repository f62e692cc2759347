"""One life of an expert host as its controller calls it: in a process of its own, or a guest in another host's.

The controller imports this to make such actors, so what computes is imported only where one lives.
"""

import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from cluster.roster import HostReport
from cluster.spec import CONTROLLER_NAME, ServiceSpec
from cluster.threads import Share
from model.checkpoint import Stamps
from router.holding import Pair
from router.placement import Host

ORPHAN_CHECK_S = 5.0
ORPHAN_CHECKS = 12  # looks without a controller after which nobody is left to serve


@dataclass(frozen=True, slots=True)
class HostInfo:
    """Where a ready host is and what it holds."""

    report: HostReport
    pid: int
    node: str
    nbytes: int
    stamps: Stamps  # of the checkpoint's files on its node
    load_s: float  # that it took to load what it began with


class Resident:
    """An `ExpertLife` on a Ray node. `begin`, `take` and `wait_for_end` run while other methods answer."""

    def __init__(self, spec: ServiceSpec, name: str, token: str, threads: int) -> None:
        """`threads` is what the process computes with; a guest leaves that as it is."""
        from cluster.expert_life import ExpertLife

        self._life = ExpertLife(spec, name, token, threads)
        self._ended = threading.Event()

    def warm(self) -> int:
        """See `ExpertLife.warm`; the process's id."""
        self._life.warm()
        return os.getpid()

    def begin(
        self, host_id: str, generation: int, pairs: Collection[Pair], threads: int, stamps: Mapping[str, Stamps]
    ) -> HostInfo:
        """Be this life from now on, with the files that `stamps` has for this node: see `ExpertLife.begin`."""
        here = stamps.get(ray.get_runtime_context().get_node_id())
        self._life.begin(host_id, generation, pairs, threads, here, f"{ray.util.get_node_ip_address()}:0")
        return self._info()

    def settle(self) -> HostInfo:
        """End what an earlier controller began; raises RuntimeError before `begin` is done."""
        self._life.settle()
        return self._info()

    def take(self, change_id: str, pairs: Collection[Pair], sources: Mapping[Pair, Host]) -> tuple[HostInfo, int, int]:
        """Hold further pairs, all of them or none; how many came from hosts, and from disk.

        Raises what `Loader.load` raises.
        """
        report = self._life.take(change_id, pairs, sources)
        return self._info(), report.from_hosts, report.from_disk

    def taken(self, change_id: str) -> int:
        """Pairs loaded for a change so far."""
        return self._life.taken(change_id)

    def abandon(self, change_id: str) -> None:
        """`take` of this change shall end, and leave nothing behind."""
        self._life.abandon(change_id)

    def drop(self, pairs: Collection[Pair]) -> HostInfo:
        """Hold these pairs no longer; those that are not held are fine."""
        self._life.drop(pairs)
        return self._info()

    def share(self, share: Share) -> None:
        """See `ExpertLife.share`."""
        self._life.share(share)

    def ping(self) -> None:
        """Answered by whoever is not frozen."""

    def progress(self) -> tuple[int, int]:
        """Experts loaded, and to load, at the start of this life."""
        return self._life.progress

    def wait_for_end(self) -> None:
        """Return when the life was told to stop; whoever waits learns of its process's death at once."""
        self._ended.wait()

    def stop(self) -> None:
        """Close the door, letting requests in flight finish."""
        self._life.stop()
        self._ended.set()

    def _info(self) -> HostInfo:
        life = self._life
        node = ray.get_runtime_context().get_node_id()
        return HostInfo(life.report(), os.getpid(), node, life.nbytes, life.stamps, life.load_s)


def wait_until_unwanted(namespace: str, name: str, over: threading.Event) -> None:
    """Return when nobody is left to serve, when the controller does not know `name` any more, or once it is `over`."""
    misses = 0
    while misses < ORPHAN_CHECKS and not over.wait(ORPHAN_CHECK_S):
        try:
            controller = ray.get_actor(CONTROLLER_NAME, namespace=namespace)
        except ValueError:
            misses += 1
            continue
        misses = 0
        try:
            wanted = ray.get(controller.wants.remote(name), timeout=ORPHAN_CHECK_S)
        except (RayActorError, GetTimeoutError):
            continue  # it is being restarted
        if not wanted:
            return
