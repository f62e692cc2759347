"""One life of one expert host as a Ray actor. Ray starts it and watches it; rows come by NIXL or gRPC."""

import os
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from cluster.roster import HostReport
from cluster.spec import CONTROLLER_NAME, ServiceSpec
from cluster.threads import node_threads
from experts.grpc_server import ExpertServer
from experts.host import ExpertHost
from experts.loader import Loader, LoadReport
from experts.nixl_agent import prepare_environment
from experts.nixl_door import NixlDoor
from experts.transports import open_door
from kernels.native import native
from kernels.threads import set_threads
from model.checkpoint import Checkpoint, Stamps
from router.holding import Pair
from router.placement import Host

ORPHAN_CHECK_S = 5.0
ORPHAN_CHECKS = 12  # looks without a controller after which the actor ends itself


@dataclass(frozen=True, slots=True)
class HostInfo:
    """Where a ready host is and what it holds."""

    report: HostReport
    pid: int
    node: str
    nbytes: int
    stamps: Stamps  # of the checkpoint's files on its node


class ExpertActor:
    """Threaded actor: `begin` and `take` run while the other methods answer. Nobody until `begin`."""

    def __init__(self, spec: ServiceSpec, name: str, token: str, threads: int) -> None:
        set_threads(threads)
        prepare_environment()
        self._spec = spec
        self._name = name
        self._token = token
        self._stamps: Stamps = {}
        self._id = ""
        self._generation = 0
        self._progress = (0, 1)
        self._door: NixlDoor | None = None
        self._checkpoint: Checkpoint | None = None
        self._server: ExpertServer | None = None
        self._host: ExpertHost | None = None
        self._loader: Loader | None = None
        self._taking = threading.Lock()  # around one change's load
        self._abandoned: set[str] = set()
        self._taken = ("", 0)  # change, and pairs loaded for it so far
        self._ended = threading.Event()
        threading.Thread(target=self._follow_controller, name="orphan-check", daemon=True).start()

    def warm(self) -> int:
        """Do what can be done before it is known who this will be; the process's id.

        Raises CheckpointError when the checkpoint cannot be read, and NixlMissing when NIXL is wanted and not
        installed.
        """
        if self._checkpoint is None:
            self._door = open_door(self._spec.transport, self._name, 0)
            self._checkpoint = Checkpoint.open(self._spec.model)
        return os.getpid()

    def begin(
        self, host_id: str, generation: int, pairs: Collection[Pair], threads: int, stamps: Mapping[str, Stamps]
    ) -> HostInfo:
        """Be this life from now on: read the named experts and open the door.

        Raises what `warm` raises, and CheckpointError when the files are not those that `stamps` has for this node.
        """
        set_threads(threads)
        self._id, self._generation = host_id, generation
        self.warm()
        checkpoint, door = self._checkpoint, self._door
        assert checkpoint is not None
        self._stamps = stamps.get(ray.get_runtime_context().get_node_id()) or checkpoint.stamps()
        checkpoint.check_stamps(self._stamps)
        if door is not None:
            door.become(host_id, generation)
        device = "cuda" if self._spec.gpus > 0 else "cpu"
        host = ExpertHost(checkpoint.config, host_id, generation, device)
        host.load(checkpoint, sorted(pairs), self._on_progress)
        server = ExpertServer(host, f"{ray.util.get_node_ip_address()}:0", self._token, self._spec.tls, door)
        server.start()
        self._host, self._server = host, server
        self._loader = Loader(host, checkpoint, self._token, self._spec.tls, stamps=self._stamps)
        return self.info()

    def info(self) -> HostInfo:
        """This host's address and content; raises RuntimeError before `begin` is done."""
        if self._host is None or self._server is None:
            raise RuntimeError(f"{self._id} is still loading")
        report = HostReport(
            self._id,
            self._generation,
            self._server.address,
            frozenset(self._host.held),
            compute=float(node_threads()),
        )
        node = ray.get_runtime_context().get_node_id()
        return HostInfo(report, os.getpid(), node, self._host.stats().nbytes, self._stamps)

    def settle(self) -> HostInfo:
        """End what an earlier controller began, and `info`; raises RuntimeError before `begin` is done."""
        self._abandoned.add(self._taken[0])
        with self._taking:
            return self.info()

    def take(
        self, change_id: str, pairs: Collection[Pair], sources: Mapping[Pair, Host]
    ) -> tuple[HostInfo, LoadReport]:
        """Hold further pairs, all of them or none; raises what `Loader.load` raises."""
        if self._loader is None:
            raise RuntimeError(f"{self._id} is still loading")
        with self._taking:
            self._taken = (change_id, 0)

            def on_progress(done: int) -> None:
                self._taken = (change_id, done)

            report = self._loader.load(pairs, sources, lambda: change_id in self._abandoned, on_progress)
            return self.info(), report

    def taken(self, change_id: str) -> int:
        """Pairs loaded for a change so far."""
        return self._taken[1] if self._taken[0] == change_id else 0

    def abandon(self, change_id: str) -> None:
        """`take` of this change shall end, and leave nothing behind."""
        self._abandoned.add(change_id)

    def drop(self, pairs: Collection[Pair]) -> HostInfo:
        """Hold these pairs no longer; those that are not held are fine."""
        if self._host is None:
            raise RuntimeError(f"{self._id} is still loading")
        held = set(self._host.held)
        self._host.unload(sorted(pair for pair in pairs if pair in held))
        return self.info()

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on, where the bits do not depend on it."""
        if native() is not None:
            set_threads(threads)

    def ping(self) -> None:
        """Answered by whoever is not frozen."""

    def progress(self) -> tuple[int, int]:
        """Experts loaded, and to load, at the start of this life."""
        return self._progress

    def wait_for_end(self) -> None:
        """Return when the actor was told to stop; whoever waits learns of its death at once."""
        self._ended.wait()

    def stop(self) -> None:
        """Close the door, letting requests in flight finish."""
        if self._server is not None:
            self._server.stop()
        self._ended.set()

    def _on_progress(self, done: int, total: int) -> None:
        self._progress = (done, total)

    def _follow_controller(self) -> None:
        """End this process when nobody is left to serve, or when the controller does not know it any more."""
        misses = 0
        while misses < ORPHAN_CHECKS:
            time.sleep(ORPHAN_CHECK_S)
            try:
                controller = ray.get_actor(CONTROLLER_NAME, namespace=self._spec.namespace)
            except ValueError:
                misses += 1
                continue
            misses = 0
            try:
                wanted = ray.get(controller.wants.remote(self._name), timeout=ORPHAN_CHECK_S)
            except (RayActorError, GetTimeoutError):
                continue  # it is being restarted
            if not wanted:
                break
        os._exit(0)
