"""One life of one expert host as a Ray actor. Ray starts it and watches it; rows come by gRPC."""

import os
import threading
import time
from dataclasses import dataclass

import ray

from cluster.spec import CONTROLLER_NAME, ServiceSpec
from experts.grpc_server import ExpertServer
from experts.host import ExpertHost
from experts.nixl_agent import prepare_environment
from experts.transports import open_door
from kernels.threads import set_threads
from model.checkpoint import Checkpoint

ORPHAN_CHECK_S = 5.0
ORPHAN_CHECKS = 12  # looks without a controller after which the actor ends itself


@dataclass(frozen=True, slots=True)
class HostInfo:
    """Where a ready host is and what it holds."""

    id: str
    generation: int
    address: str
    pid: int
    node: str
    experts: int
    nbytes: int


class ExpertActor:
    """Threaded actor: `load` runs while the other methods answer."""

    def __init__(self, spec: ServiceSpec, host_id: str, generation: int, token: str, threads: int) -> None:
        set_threads(threads)
        prepare_environment()
        self._spec = spec
        self._token = token
        self._id = host_id
        self._generation = generation
        self._progress = (0, 1)
        self._server: ExpertServer | None = None
        self._host: ExpertHost | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._follow_controller, name="orphan-check", daemon=True).start()

    def load(self, held: list[tuple[int, int]]) -> HostInfo:
        """Read the named experts and open the door.

        Raises CheckpointError when they cannot be read, and NixlMissing when NIXL is wanted and not installed.
        """
        door = open_door(self._spec.transport, self._id, self._generation)
        checkpoint = Checkpoint.open(self._spec.model)
        device = "cuda" if self._spec.gpus > 0 else "cpu"
        host = ExpertHost(checkpoint.config, self._id, self._generation, device)
        host.load(checkpoint, held, self._on_progress)
        server = ExpertServer(host, f"{ray.util.get_node_ip_address()}:0", self._token, self._spec.tls, door)
        server.start()
        self._host, self._server = host, server
        return self.info()

    def info(self) -> HostInfo:
        """This host's address and content; raises RuntimeError before `load` is done."""
        if self._host is None or self._server is None:
            raise RuntimeError(f"{self._id} is still loading")
        stats = self._host.stats()
        node = ray.get_runtime_context().get_node_id()
        return HostInfo(
            self._id, self._generation, self._server.address, os.getpid(), node, stats.experts, stats.nbytes
        )

    def progress(self) -> tuple[int, int]:
        """Experts loaded, and to load."""
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
        misses = 0
        while misses < ORPHAN_CHECKS:
            time.sleep(ORPHAN_CHECK_S)
            try:
                ray.get_actor(CONTROLLER_NAME, namespace=self._spec.namespace)
                misses = 0
            except ValueError:
                misses += 1
        os._exit(0)  # nobody is left to serve
