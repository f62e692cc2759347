"""Training in one process: hosts, workers as threads, and transformers beside them."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from attention.training.decoder import ForwardOptions, TrainingDecoder
from attention.training.optimizer import DenseOptimizer
from attention.training.parameters import DenseParameters
from attention.training.ranks import OneRank, Ranks
from attention.training.segments import MicroBatch
from attention.training.worker import StepPlan, StepReport, TrainingWorker
from experts.grpc_server import ExpertServer
from experts.grpc_transport import GrpcTransport
from experts.host import ExpertHost
from experts.local import LocalTransport
from experts.training.adamw import AdamW
from experts.training.client import TrainingClient
from experts.training.coordinator import Coordinator
from experts.training.door import TrainingDoor
from experts.training.grpc_peer import GrpcPeers
from experts.training.host import TrainingHost
from experts.training.peer import Peers
from experts.training.spec import ExpertTraining
from experts.training.step_hosts import StepPlacement
from experts.training.store import TrainableExperts
from experts.training.waiting import Supervisor
from experts.transport import Transport
from model.checkpoint import Checkpoint
from router.placement import Host, Placement, initial_placement
from tests.training.local import LocalPeers

TOKEN = "the-token-of-this-run"


class ThreadRanks:
    """Workers that are threads of one process."""

    def __init__(self, rank: int, world: int, shared: "Meeting") -> None:
        self.rank, self.world, self._shared = rank, world, shared

    def sum(self, tensors: Sequence[Tensor]) -> None:
        parts = self._shared.exchange(self.rank, list(tensors))
        totals = [torch.stack([part[place] for part in parts]).sum(0) for place in range(len(tensors))]
        self._shared.wait()
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total)

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        parts = self._shared.exchange(self.rank, [tensor.clone() for tensor in tensors])
        for tensor, given in zip(tensors, parts[source], strict=True):
            tensor.copy_(given)

    def gather(self, message: str) -> list[str]:
        return list(self._shared.exchange(self.rank, message))


class Meeting:
    """Where threads hand things to one another."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=60)
        self._given: list[object] = [None] * world

    def wait(self) -> None:
        self._barrier.wait()

    def exchange(self, rank: int, thing: object) -> list:  # type: ignore[type-arg]
        self._given[rank] = thing
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found


class Table:
    """A placement source that a test moves on by hand."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.in_use: Placement | None = None
        self.on_wait: Callable[[], None] | None = None

    def newest(self, wait: bool) -> Placement:
        if wait and self.on_wait is not None:
            self.on_wait()
        return self.placement

    def used(self, placement: Placement) -> None:
        self.in_use = placement


@dataclass
class Rig:
    """A run over local hosts."""

    checkpoint: Checkpoint
    hosts: dict[str, TrainingHost]
    expert_hosts: dict[str, ExpertHost]
    table: Table
    workers: list[TrainingWorker]
    denses: list[DenseParameters]
    optimizers: list[DenseOptimizer]
    clients: list[TrainingClient]
    lost: list[str] = field(default_factory=list)  # hosts, in all steps so far
    on_report: Callable[[Host, str], None] = lambda host, reason: None  # a client's word about a host

    def step(self, plans: Sequence[StepPlan]) -> list[StepReport]:
        """One step of all workers; raises what they raise, which must be the same on all."""
        reports = self._step(plans)
        assert len({report.hosts_lost for report in reports}) == 1
        self.lost.extend(reports[0].hosts_lost)
        return reports

    def _step(self, plans: Sequence[StepPlan]) -> list[StepReport]:
        if len(self.workers) == 1:
            return [self.workers[0].step(plans[0])]
        out: list[StepReport | Exception | None] = [None] * len(self.workers)

        def run(rank: int) -> None:
            try:
                out[rank] = self.workers[rank].step(plans[rank])
            except Exception as error:  # noqa: BLE001  # told below
                out[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.workers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        errors = [one for one in out if isinstance(one, Exception)]
        if errors:
            assert {type(error) for error in errors} == {type(errors[0])}, errors
            raise errors[0]
        return [one for one in out if isinstance(one, StepReport)]

    def expert_gradients(self) -> dict[str, Tensor]:
        """Of every expert's parameters; replicas must have the same."""
        found: dict[str, Tensor] = {}
        for host in self.hosts.values():
            for layer, expert in host.host.held:
                for name, trained in host.expert((layer, expert)).parameters.items():
                    key = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                    grad = trained.grad if trained.grad is not None else torch.zeros_like(trained.value)
                    if key in found:
                        assert torch.equal(found[key], grad)
                    found[key] = grad
        return found


class Doors:
    """Hosts of a rig behind gRPC."""

    def __init__(self, checkpoint: Checkpoint, supervisor: Supervisor | None = None) -> None:
        self._checkpoint = checkpoint
        self._servers: list[ExpertServer] = []
        self.peers = GrpcPeers(TOKEN, None, supervisor)
        self.transport = GrpcTransport(TOKEN)

    def open(self, name: Host, host: ExpertHost, training: TrainingHost) -> Host:
        """Serve a life; its name with the address."""
        door = TrainingDoor(training, self._checkpoint, self.peers.fetch)
        server = ExpertServer(host, token=TOKEN, training=door)
        server.start()
        self._servers.append(server)
        return replace(name, address=server.address)

    def close(self) -> None:
        self.transport.close()
        self.peers.close()
        for server in self._servers:
            server.stop(0)


def make_host(checkpoint: Checkpoint, name: Host, pairs: Sequence[tuple[int, int]]) -> tuple[ExpertHost, TrainingHost]:
    """A life of a training host with its experts."""
    host = ExpertHost(checkpoint.config, name.id, name.generation, make_store=TrainableExperts)
    host.load(checkpoint, pairs)
    return host, TrainingHost(host)


def make_rig(
    path: Path,
    hosts: int = 2,
    replicas: int = 1,
    workers: int = 1,
    training: ExpertTraining | None = None,
    options: ForwardOptions | None = None,
    clip: float | None = None,
    length: int = 64,
    make_dense: Callable[[Checkpoint], DenseParameters] | None = None,
    doors: Doors | None = None,
) -> Rig:
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    names = [Host(f"host-{number}", 1, "local") for number in range(hosts)]
    placement = initial_placement(config, names, replicas)
    training = training or ExpertTraining("run", adamw=AdamW(weight_decay=0.1))
    expert_hosts: dict[str, ExpertHost] = {}
    training_hosts: dict[str, TrainingHost] = {}
    for name in names:
        expert_hosts[name.id], training_hosts[name.id] = make_host(checkpoint, name, placement.held_by(name.id))
    peers: Peers = LocalPeers(training_hosts, checkpoint)
    transport: Transport = LocalTransport(expert_hosts)
    if doors is not None:
        names = [doors.open(name, expert_hosts[name.id], training_hosts[name.id]) for name in names]
        placement = replace(placement, hosts=tuple(names))
        peers, transport = doors.peers, doors.transport
    table = Table(placement)
    rig = Rig(checkpoint, training_hosts, expert_hosts, table, [], [], [], [])
    meeting = Meeting(workers)
    for rank in range(workers):
        ranks: Ranks = OneRank() if workers == 1 else ThreadRanks(rank, workers, meeting)
        source = StepPlacement(lambda host: host.id in training_hosts, lambda *said: rig.on_report(*said))
        client = TrainingClient(transport, peers, source, rank, config.hidden_size)
        dense = make_dense(checkpoint) if make_dense else DenseParameters.load(checkpoint, lambda name: True)
        decoder = TrainingDecoder(config, dense, client, options or ForwardOptions(), length)
        optimizer = DenseOptimizer(dense.trained, training.adamw, ranks)
        coordinator = Coordinator(peers, training) if rank == 0 else None
        rig.workers.append(
            TrainingWorker(ranks, decoder, client, optimizer, clip, coordinator, table if rank == 0 else None)
        )
        rig.denses.append(dense)
        rig.optimizers.append(optimizer)
        rig.clients.append(client)
    return rig


def samples(vocabulary: int, lengths: Sequence[int], seed: int = 0) -> MicroBatch:
    """Random tokens in samples of these lengths; every token but each sample's first is a target."""
    generator = torch.Generator().manual_seed(seed)
    token_T = torch.randint(2, vocabulary, (sum(lengths),), generator=generator)
    target_T = torch.full_like(token_T, -100)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    for start, end in zip(starts, ends, strict=True):
        target_T[start : end - 1] = token_T[start + 1 : end]
    position_T = torch.cat([torch.arange(length) for length in lengths])
    return MicroBatch(token_T, target_T, position_T, tuple(ends))


def plans(step: int, batches: Sequence[Sequence[MicroBatch | None]], learning_rate: float = 1e-3) -> list[StepPlan]:
    """One plan a worker, from each one's micro-batches."""
    every = [batch for mine in batches for batch in mine if batch is not None]
    targets, sequences = sum(batch.targets for batch in every), sum(len(batch.ends) for batch in every)
    return [StepPlan(step, tuple(mine), targets, sequences, learning_rate) for mine in batches]
