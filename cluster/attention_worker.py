"""An attention worker: the dense side of the model, its engine and its door, known to the controller."""

import contextlib
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from attention.cache import bytes_per_block
from attention.decoder import Decoder, halving_rows
from attention.engine import Engine, EngineLimits, EngineStats
from attention.runner import EngineThread
from attention.scheduler import SchedulerLimits
from attention.service import AttentionServer
from cluster.discovery import find_controller, join_service
from cluster.joining import contents_of
from cluster.membership import PlacementFollower
from cluster.spec import ServiceSpec, WorkerSpec
from cluster.step_watch import StepWatch
from cluster.threads import node_threads
from experts.client import ExpertClient
from experts.nixl import prepare_environment
from experts.transport_kinds import Way
from experts.transports import open_transport
from kernels.threads import set_threads
from model.adapters.overlay import open_with_adapters
from model.grammar import Grammars
from router.load import LoadMeter

HEARTBEAT_S = 1.0
HURRY_S = 0.1  # until a heartbeat was heard, and the engine uses the newest table
HOSTS_TIMEOUT_S = 600.0  # without another expert loaded, before the worker gives up
DRAIN_S, DRAIN_POLL_S = 2.0, 0.02  # for what is running when the worker is to end; the rest moves on


class AttentionWorker:
    """Loads while the hosts load, and opens its door once they hold every expert."""

    def __init__(self, service: ServiceSpec, spec: WorkerSpec, worker_id: str) -> None:
        set_threads(spec.threads or node_threads())
        prepare_environment()
        self._id = worker_id
        self._namespace = service.namespace
        checkpoint = open_with_adapters(service.model, service.adapters)
        controller, self._token = join_service(service, contents_of(checkpoint))
        token = self._token
        self._placements = PlacementFollower(service.namespace, token)
        config = checkpoint.config
        self._transport = open_transport(
            service.transport, token, service.tls, spec.step_tokens, config.num_experts_per_tok, config.hidden_size
        )
        self._meter = LoadMeter(config.moe_layers, config.n_routed_experts)
        self._client = ExpertClient(self._transport, self._placements, spec.expert_deadline_s, meter=self._meter)
        device = "cuda" if spec.gpus > 0 else "cpu"
        decoder = Decoder(checkpoint, self._client, self._placements, device, halve_from=halving_rows(config))
        limits = EngineLimits(
            cache_blocks=-(-spec.cache_tokens // spec.block_size),
            block_size=spec.block_size,
            max_length=spec.max_length,
            scheduler=SchedulerLimits(spec.step_tokens, spec.running),
        )
        self.cache_bytes = limits.cache_blocks * bytes_per_block(checkpoint.config, spec.block_size)
        self._wait_for_hosts(controller)
        grammars = Grammars(Path(service.model), config.vocab_size, config.eos_token_ids)
        self._engine = EngineThread(Engine(decoder, limits, grammars))
        self._step_watch = StepWatch(spec.expert_deadline_s)
        self._server = AttentionServer(self._engine, f"{ray.util.get_node_ip_address()}:0", token, service.tls)
        self._server.start()
        self._leaving = threading.Event()
        self._beat_now = threading.Event()
        self._placements.on_newer = self._beat_now.set
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    @property
    def address(self) -> str:
        return self._server.address

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check_health(self) -> None:
        """Raises RuntimeError, for Serve to replace this worker, when its engine has failed, or its step hangs."""
        if not self._engine.alive:
            raise RuntimeError(f"the engine of {self._id} has stopped: {self._engine.failure!r}")
        layers = self._client.stats().dispatches
        stands_s = self._step_watch.stands_s(self._engine.step_age_s(), layers, time.monotonic())
        if stands_s > self._step_watch.longest_s:
            raise RuntimeError(f"a step of {self._id} has not got on for {stands_s:.0f} s")

    def close(self) -> None:
        """Finish what is nearly done, for there may be no other worker; leave the list of workers; end what is left."""
        deadline_s = time.monotonic() + DRAIN_S
        while self._engine.alive and self._engine.busy and time.monotonic() < deadline_s:
            time.sleep(DRAIN_POLL_S)
        self._leaving.set()
        self._beat_now.set()
        with contextlib.suppress(ValueError, RayActorError, GetTimeoutError):  # nobody keeps a list any more
            ray.get(find_controller(self._namespace).leave.remote(self._id), timeout=2)
        self._server.stop(0.5)
        self._engine.close()
        self._transport.close()
        self._placements.close()

    def _wait_for_hosts(self, controller: object) -> None:
        waited_s, most = 0.0, 0
        while not self._placements.wait_first(1.0):
            waited_s += 1.0
            status = ray.get(controller.status.remote())  # type: ignore[attr-defined]
            loaded = sum(host["progress"][0] for host in status["expert_hosts"])
            if loaded > most:  # large models take their time, as long as it goes on
                waited_s, most = 0.0, loaded
            if status["state"] == "failed":
                raise RuntimeError(f"the expert hosts cannot start: {status['reason']}")
            if waited_s > HOSTS_TIMEOUT_S:
                raise RuntimeError(f"the expert hosts were not ready, and loaded nothing in {HOSTS_TIMEOUT_S:.0f} s")

    def _beat(self) -> None:
        info = {
            "id": self._id,
            "address": self.address,
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "state": "ready",
        }
        counts: dict[int, list[int]] = {}
        while not self._leaving.is_set() and self._engine.alive:
            self._beat_now.clear()
            epoch, newest = self._placements.epoch_in_use(lambda: self._engine.step_age_s() is None)
            counts = counts or self._meter.take()
            stats = asdict(self.stats()) | asdict(self._client.stats())
            heard = self._greet(info | stats | {"epoch": epoch, "load": counts, "ways": self._ways()})
            if heard:
                counts = {}
            self._beat_now.wait(HEARTBEAT_S if heard and newest else HURRY_S)

    def _ways(self) -> dict[str, Way]:
        """By which way rows go just now, by the id of each host of the newest table that was asked."""
        placement, ways = self._placements.peek(), self._transport.ways()
        return {host.id: ways[host] for host in placement.hosts if host in ways} if placement is not None else {}

    def _greet(self, info: dict[str, object]) -> bool:
        try:
            known = ray.get(find_controller(self._namespace).heartbeat.remote(self._token, info), timeout=5)
        except (ValueError, RayActorError, GetTimeoutError):
            return False
        if not known:  # its hosts are gone, too; what came with the new service takes this worker's place
            self._engine.close()
        return True
