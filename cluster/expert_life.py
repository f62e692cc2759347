"""What one life of an expert host is made of, without Ray: its experts, its door, and what it takes on."""

import logging
import os
import threading
import time
from collections.abc import Collection, Mapping

from cluster.expert_memory import most_pairs
from cluster.roster import HostReport
from cluster.spec import ServiceSpec
from cluster.threads import Share, keep_to
from experts.grpc_server import ExpertServer
from experts.held import MakeStore
from experts.host import ExpertHost
from experts.lease_door import LeaseDoor
from experts.loader import LoadAbandoned, Loader, LoadReport
from experts.nixl import prepare_environment
from experts.training.door import TrainingDoor
from experts.training.grpc_peer import GrpcPeers
from experts.training.host import TrainingHost
from experts.training.store import TrainableExperts
from experts.transports import open_door
from kernels.experts import PackedExperts
from kernels.native import arithmetic, native
from kernels.threads import set_threads
from model.adapters.overlay import open_with_adapters
from model.checkpoint import Checkpoint, Stamps
from router.holding import Pair
from router.placement import Host

log = logging.getLogger("shoal.experts")


class ExpertLife:
    """Nobody until `begin`. Its methods may be called from several threads.

    Where `spec` lodges with another service, the process and its threads are that service's, and stay as they are.
    """

    def __init__(self, spec: ServiceSpec, name: str, token: str, threads: int) -> None:
        self._spec = spec
        self._cores = os.sched_getaffinity(0)  # of the node, before any share of them
        self._compute_with(threads)
        prepare_environment()
        self._name = name
        self._token = token
        self.stamps: Stamps = {}
        self.progress = (0, 1)  # experts loaded, and to load, at the start of this life
        self.load_s = 0.0  # that it took
        self._door: LeaseDoor | None = None
        self._checkpoint: Checkpoint | None = None
        self._server: ExpertServer | None = None
        self._host: ExpertHost | None = None
        self._loader: Loader | None = None
        self._room: int | None = None  # (layer, expert) pairs for which there is memory
        self._beginning = threading.Lock()  # around `begin`
        self._taking = threading.Lock()  # around one change's load, or a drop; taken after the other
        self._over = False
        self._asked: set[str] = set()  # changes for which something was, or will be, taken
        self._abandoned: set[str] = set()
        self._taken = ("", 0)  # change, and pairs loaded for it so far

    def warm(self) -> Checkpoint:
        """Do what can be done before it is known who this will be.

        Raises CheckpointError when the checkpoint cannot be read, and NixlMissing when NIXL is wanted and not
        installed.
        """
        if self._checkpoint is None:
            self._door = open_door(self._spec.transport, self._name, 0)
            self._checkpoint = open_with_adapters(self._spec.model, self._spec.adapters)
        return self._checkpoint

    def begin(
        self, host_id: str, generation: int, pairs: Collection[Pair], threads: int, stamps: Stamps | None, address: str
    ) -> None:
        """Be this life from now on: read the named experts and open the door at `address`.

        Raises what `warm` raises, CheckpointError when the files are not those of `stamps`, and LoadAbandoned when it
        is ended meanwhile.
        """
        with self._beginning:
            self._begin(host_id, generation, pairs, threads, stamps, address)

    def _begin(
        self, host_id: str, generation: int, pairs: Collection[Pair], threads: int, stamps: Stamps | None, address: str
    ) -> None:
        if self._over:
            raise LoadAbandoned(f"{self._name} was ended before it began")
        self._compute_with(threads)
        checkpoint = self.warm()
        self.stamps = stamps or checkpoint.stamps()
        checkpoint.check_stamps(self.stamps)
        if self._door is not None:
            self._door.become(host_id, generation)
        device = "cuda" if self._spec.gpus > 0 else "cpu"
        make_store: MakeStore = TrainableExperts if self._spec.trains else PackedExperts
        host = ExpertHost(checkpoint.config, host_id, generation, device, make_store)
        self._room = None if self._spec.trains else most_pairs(checkpoint.config, self._spec.gpus)
        began_s = time.monotonic()
        host.load(checkpoint, sorted(pairs), self._on_progress)
        self.load_s = time.monotonic() - began_s
        training: TrainingDoor | None = None
        if self._spec.trains:
            fetch = GrpcPeers(self._token, self._spec.tls).fetch
            training = TrainingDoor(TrainingHost(host), checkpoint, fetch)
        server = ExpertServer(host, address, self._token, self._spec.tls, self._door, training)
        server.start()
        self._host, self._server = host, server
        self._loader = Loader(host, checkpoint, self._token, self._spec.tls, stamps=self.stamps)

    def report(self) -> HostReport:
        """Where this host is and what it holds; raises RuntimeError before `begin` is done."""
        host, server = self._host, self._server
        if host is None or server is None:
            raise RuntimeError(f"{self._name} is still loading")
        return HostReport(
            host.host_id,
            host.generation,
            server.address,
            frozenset(host.held),
            compute=float(len(self._cores)),
            max_pairs=None if self._room is None else max(self._room, len(host.held)),
            arithmetic=arithmetic("cuda" if self._spec.gpus > 0 else "cpu"),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the experts that are held."""
        return self._host.stats().nbytes if self._host is not None else 0

    def settle(self) -> None:
        """End what an earlier controller began: what is held then stays so."""
        self._abandoned |= self._asked
        with self._taking:
            return

    def take(self, change_id: str, pairs: Collection[Pair], sources: Mapping[Pair, Host]) -> LoadReport:
        """Hold further pairs, all of them or none; raises what `Loader.load` raises."""
        if self._loader is None:
            raise RuntimeError(f"{self._name} is still loading")
        self._asked.add(change_id)
        with self._taking:
            self._taken = (change_id, 0)

            def on_progress(done: int) -> None:
                self._taken = (change_id, done)

            return self._loader.load(pairs, sources, lambda: self._over or change_id in self._abandoned, on_progress)

    def taken(self, change_id: str) -> int:
        """Pairs loaded for a change so far."""
        return self._taken[1] if self._taken[0] == change_id else 0

    def abandon(self, change_id: str) -> None:
        """`take` of this change shall end, and leave nothing behind."""
        self._abandoned.add(change_id)

    def drop(self, pairs: Collection[Pair]) -> None:
        """Hold these pairs no longer; those that are not held are fine."""
        with self._taking:
            if self._host is None:
                raise RuntimeError(f"{self._name} is still loading")
            held = set(self._host.held)
            self._host.unload(sorted(pair for pair in pairs if pair in held))

    def share(self, share: Share) -> None:
        """Keep to a share of the node's cores, and compute with its threads where the bits do not depend on them."""
        if self._spec.lodges_with is None:
            if native() is not None and not self._spec.trains:
                set_threads(share.threads)
            try:
                keep_to(share.cores(self._cores))
            except OSError as error:  # its cores were taken away: it computes wherever it may
                log.warning("%s does not keep to its cores: %s", self._name, error)

    def stop(self) -> None:
        """Close the door, letting requests in flight finish."""
        if self._server is not None:
            self._server.stop()

    def end(self) -> None:
        """Stop whatever is under way, and give back what this life holds of a process that goes on without it."""
        self._over = True
        with self._beginning, self._taking:
            self.stop()
            if self._server is None and self._door is not None:
                self._door.close()
            if self._host is not None:
                self._host.unload(self._host.held)
            self._host = self._server = self._loader = self._door = self._checkpoint = None

    def _compute_with(self, threads: int) -> None:
        if self._spec.lodges_with is None:
            set_threads(threads)

    def _on_progress(self, done: int, total: int) -> None:
        if self._over:
            raise LoadAbandoned(f"{self._name} was ended while it was loading")
        self.progress = (done, total)
