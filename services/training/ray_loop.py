"""What each Ray Train worker runs: the parts of a run put together, and its loop."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import Tensor

from attention.training.decoder import ForwardOptions, TrainingDecoder
from attention.training.optimizer import DenseOptimizer
from attention.training.parameters import DenseParameters
from attention.training.ranks import DistributedRanks, OneRank, Ranks
from attention.training.worker import NotFinite, TrainingWorker
from cluster.spec import ServiceSpec
from cluster.threads import node_threads
from cluster.training_hosts import TrainingHosts
from experts.errors import ExpertError
from experts.tls import TlsFiles
from experts.training.coordinator import Coordinator
from experts.training.spec import as_pairs
from kernels.threads import set_threads
from model.adapters.errors import AdapterError
from model.checkpoint import Checkpoint, CheckpointError
from model.config import read_raw_config
from model.snapshots.errors import SnapshotError
from router.holding import Pair
from router.losses import BalanceCoefficients
from services.training.agree import together
from services.training.choice import choose_once, chosen_pairs, relevance
from services.training.identity import identify
from services.training.inputs import shared_data
from services.training.keeper import Keeper
from services.training.method import Method, make_method
from services.training.outcome import SNAPSHOTS, STOP, Outcome, read_outcome, tell, write_outcome
from services.training.plans import lay_flat
from services.training.recipe import Recipe, parse_recipe
from services.training.report import RunLogError
from services.training.result import TrainedModel, raw_with_yarn, with_yarn, write_result
from services.training.run import Run, TooManySetbacks
from services.training.run_records import RunRecords
from services.training.trainer import from_plain


def train_worker(config: Mapping[str, Any]) -> None:
    """`config` has the recipe, the service and the number of steps, as plain data."""
    recipe = parse_recipe(config["recipe"])
    earlier = read_outcome(recipe.output_dir)
    if earlier is not None and earlier.failed is not None:
        return  # a life of this very run found that it cannot go on, and so would this one
    service = from_plain(config["service"])
    context = ray.train.get_context()
    ranks: Ranks = DistributedRanks() if context.get_world_size() > 1 else OneRank()
    set_threads(recipe.workers.threads or node_threads())
    torch.set_num_threads(recipe.workers.threads or node_threads())
    try:
        together(ranks, lambda: _WorkerRun(recipe, service, config["steps"], ranks)).run()
    except (NotFinite, SnapshotError, AdapterError, CheckpointError, TooManySetbacks) as error:
        # Every worker is here, and would be again: an end, which Ray Train must not take for a worker's death.
        if ranks.rank == 0:
            _end(recipe.output_dir, error)
    except RunLogError as error:  # worker 0 is alone with it
        _end(recipe.output_dir, error)
        if ranks.world > 1:
            raise  # so that Ray Train ends the others, which wait for it


def _end(output_dir: Path, error: Exception) -> None:
    try:
        write_outcome(output_dir, Outcome(failed=str(error)))
    except SnapshotError:  # a full disk has no room for that either
        raise error from None


def _look_at(tls: TlsFiles) -> None:
    """Raises OSError where a file cannot be read on this node, which no later life of the worker would change."""
    try:
        tls.read()
    except ValueError as error:
        raise OSError(str(error)) from error


class _WorkerRun:
    def __init__(self, recipe: Recipe, service: ServiceSpec, steps: int, ranks: Ranks) -> None:
        self._recipe = recipe
        self._steps = steps
        self._ranks = ranks
        self._device = "cuda" if recipe.workers.gpus > 0 else "cpu"
        self._checkpoint = Checkpoint.open(service.model)
        self._config = with_yarn(self._checkpoint.config, recipe.yarn)
        self._data = shared_data(recipe)
        if service.tls is not None:
            _look_at(service.tls)
        self._hosts = TrainingHosts(service, self._checkpoint, ranks.rank, recipe.micro_batch_tokens)
        self._run_id = recipe.output_dir.name
        self._identity = identify(recipe, self._data, self._checkpoint)

    def run(self) -> None:
        recipe, ranks = self._recipe, self._ranks
        method = self._choose()
        dense = together(ranks, lambda: self._dense(method))
        decoder = self._decoder(dense)
        optimizer = DenseOptimizer(dense.trained, method.experts.adamw, ranks)
        coordinator = Coordinator(self._hosts.peers, method.experts) if ranks.rank == 0 else None
        keeper = Keeper(
            recipe.output_dir / SNAPSHOTS,
            recipe.snapshots.keep,
            self._run_id,
            self._identity,
            ranks,
            dense,
            optimizer,
            coordinator,
            self._tell,
        )
        worker = TrainingWorker(
            ranks,
            decoder,
            self._hosts.client,
            optimizer,
            recipe.optimizer.clip,
            coordinator,
            self._hosts,
            keeper.settle,
        )
        first = self._first_values(method)
        records = RunRecords(recipe.output_dir, self._config, ranks.world, self._tell) if ranks.rank == 0 else None

        def reset() -> None:
            dense.restore(first)
            optimizer.reset()

        run = Run(
            recipe,
            self._steps,
            self._data,
            ranks,
            worker,
            self._hosts.client,
            keeper,
            self._hosts,
            coordinator,
            reset,
            records,
            (recipe.output_dir / STOP).exists,
            self._tell,
            self._device,
        )
        try:
            steps = run.train()
            if ranks.rank == 0:
                self._finish(steps, method, dense)
        finally:
            keeper.close()
            if records is not None:
                records.close()
            if coordinator is not None:
                coordinator.close()
            self._hosts.close()

    def _choose(self) -> Method:
        """What is trained; for ESFT every worker looks at the same samples, and finds the same experts."""
        recipe = self._recipe
        if recipe.method != "esft":
            return make_method(recipe, self._config, self._run_id)
        looking = make_method(recipe, self._config, f"{self._run_id}-relevance")
        message: dict[str, Any] = {}
        if self._ranks.rank == 0:
            try:
                message["pairs"] = choose_once(recipe.output_dir, self._identity, lambda: self._look(looking))
            except SnapshotError as error:
                message["refused"] = str(error)
            except ExpertError as error:
                message["lost"] = str(error)
        message = json.loads(self._ranks.gather(json.dumps(message))[0])
        if "refused" in message:
            raise SnapshotError(message["refused"])
        if "lost" in message:
            raise TooManySetbacks(f"the experts to train were not chosen: {message['lost']}; begin again")
        chosen = as_pairs(message["pairs"])
        self._tell(
            f"esft trains {len(chosen)} of {len(self._config.moe_layers) * self._config.n_routed_experts} experts"
        )
        return make_method(recipe, self._config, self._run_id, chosen)

    def _look(self, looking: Method) -> tuple[Pair, ...]:
        recipe = self._recipe
        coordinator = Coordinator(self._hosts.peers, looking.experts)
        try:
            placement = self._hosts.newest(wait=False)
            coordinator.restart(placement)
            coordinator.begin(placement, 0, 1, 1)
            self._hosts.client.begin(0, placement)
            batch = self._data.batch(0, batch_samples=min(recipe.esft.samples, len(self._data)))
            found = relevance(
                self._decoder(self._dense(looking)),
                [lay_flat([row], self._device) for row in batch.rows],
                recipe.esft.by,
            )
        finally:
            coordinator.close()
        return chosen_pairs(found, recipe.esft.share)

    def _dense(self, method: Method) -> DenseParameters:
        # the method's own stay what they are, as the values that a run begins again with
        factors = {name: factor.to(self._device, copy=True) for name, factor in method.factors.items()}
        return DenseParameters.load(
            self._checkpoint, method.trains_dense, factors, method.scale, self._recipe.dtype, self._device
        )

    def _decoder(self, dense: DenseParameters) -> TrainingDecoder:
        recipe = self._recipe
        balance = BalanceCoefficients(recipe.balance.expert, recipe.balance.device, recipe.balance.communication)
        options = ForwardOptions(balance, recipe.drop_tokens, recipe.checkpointing)
        return TrainingDecoder(self._config, dense, self._hosts.client, options, recipe.data.sequence_length)

    def _first_values(self, method: Method) -> Callable[[str], Tensor]:
        def read(name: str) -> Tensor:
            factor = method.factors.get(name)
            return factor if factor is not None else self._checkpoint.tensor(name)

        return read

    def _finish(self, steps: int, method: Method, dense: DenseParameters) -> None:
        recipe, out = self._recipe, self._recipe.output_dir
        written: Path | None = None
        if recipe.export and steps == self._steps:
            model = TrainedModel(dense, self._hosts.newest(wait=False), self._hosts.peers, steps)
            raw = raw_with_yarn(read_raw_config(self._checkpoint.directory), recipe.yarn)
            written = write_result(out, recipe, self._checkpoint, raw, method, model)
        write_outcome(out, Outcome(steps, str(written), identity=asdict(self._identity)) if written else Outcome(steps))

    def _tell(self, message: str) -> None:
        if self._ranks.rank == 0:
            tell(self._recipe.output_dir, message)
