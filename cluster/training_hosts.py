"""A training worker's hold on the expert hosts of its run, which the same controller keeps as in serving."""

import contextlib
import os
import threading
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from cluster.discovery import find_controller, join_service
from cluster.joining import contents_of
from cluster.membership import PlacementFollower
from cluster.spec import ServiceSpec
from experts.grpc_transport import GrpcTransport
from experts.lease_transport import LeaseTransport
from experts.nixl import prepare_environment
from experts.training.client import TrainingClient
from experts.training.grpc_peer import GrpcPeers
from experts.training.step_hosts import StepLost, StepPlacement
from experts.transports import open_transport
from model.checkpoint import Checkpoint
from router.placement import Placement

HEARTBEAT_S = 1.0
FIRST_TABLE_S = 1800.0  # for the hosts to load
NEXT_TABLE_S = 300.0  # for lost hosts to come back
LOOK_S = 2.0


class TrainingHosts:
    """Placements, peers and a client for one worker; tells the controller which table it uses."""

    def __init__(self, service: ServiceSpec, checkpoint: Checkpoint, rank: int, step_tokens: int) -> None:
        """Starts the controller where it does not run; `step_tokens` is the largest micro-batch."""
        prepare_environment()
        self._namespace = service.namespace
        self._id = f"trainer-{rank}"
        self.controller: Any
        self.controller, self._token = join_service(service, contents_of(checkpoint))
        config, token = checkpoint.config, self._token
        self._follower = PlacementFollower(service.namespace, token)
        self._follower.use(0)
        self._transport: GrpcTransport | LeaseTransport = open_transport(
            service.transport, token, service.tls, step_tokens, config.num_experts_per_tok, config.hidden_size
        )
        source = StepPlacement(self._follower.names, self._follower.report)
        self.peers = GrpcPeers(token, service.tls, source)
        self.client = TrainingClient(self._transport, self.peers, source, rank, config.hidden_size)
        self._waiting_since_s: float | None = None
        self._closing = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def newest(self, wait: bool) -> Placement:
        """See `attention.training.worker.Placements`; raises StepLost when no table comes in time, or none can come.

        How long one waits counts from when a table was last asked for without waiting.
        """
        known = self._follower.peek()
        if not wait:
            self._waiting_since_s = None
        elif known is not None:
            self._waiting_since_s = self._waiting_since_s or time.monotonic()
            if time.monotonic() > self._waiting_since_s + NEXT_TABLE_S:
                raise StepLost(f"hosts of the newest table did not take part for {NEXT_TABLE_S:.0f} s")
        if known is None or wait:
            deadline_s = time.monotonic() + (FIRST_TABLE_S if known is None else LOOK_S)
            while time.monotonic() < deadline_s:
                self._check()
                newer = self._follower.wait_after(known.epoch if known is not None else 0, LOOK_S)
                if newer is not None and newer is not known:
                    return newer
        if known is None:
            raise StepLost(f"the expert hosts were not ready within {FIRST_TABLE_S:.0f} s")
        return known

    def used(self, placement: Placement) -> None:
        self._follower.use(placement.epoch)

    def close(self) -> None:
        """Leave the controller's list, and drop all connections."""
        self._closing.set()
        with contextlib.suppress(ValueError, RayActorError, GetTimeoutError):
            ray.get(find_controller(self._namespace).leave.remote(self._id), timeout=2)
        self._transport.close()
        self.peers.close()
        self._follower.close()

    def _check(self) -> None:
        with contextlib.suppress(RayActorError, GetTimeoutError):
            status = ray.get(self.controller.status.remote(), timeout=5)
            if status["state"] == "failed":
                raise StepLost(f"the expert hosts cannot start: {status['reason']}")

    def _beat(self) -> None:
        info = {"id": self._id, "address": "", "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
        still = {"state": "training", "load": {}, "rows_resent": 0, "resends": 0, "hedges": 0}
        while not self._closing.wait(HEARTBEAT_S):
            epoch, _ = self._follower.epoch_in_use(lambda: False)
            with contextlib.suppress(ValueError, RayActorError, GetTimeoutError):
                controller = find_controller(self._namespace)
                ray.get(controller.heartbeat.remote(self._token, info | still | {"epoch": epoch}), timeout=5)
