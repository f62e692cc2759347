"""One worker's part of a training step: forward and backward of its rows, then one step of everything, together.

All workers call `step` with the same step number; either all of them have made the step when it returns, or it raises
on all of them.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from attention.training.decoder import TrainingDecoder
from attention.training.optimizer import DenseOptimizer
from attention.training.ranks import Ranks
from attention.training.segments import MicroBatch
from experts.errors import ExpertError
from experts.training.client import TrainingClient
from experts.training.coordinator import Coordinator
from experts.training.step_hosts import StepHosts, StepLost
from router.placement import Placement


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one worker computes in one step. Every worker has the same number of micro-batches, some of them None."""

    step: int
    micro_batches: tuple[MicroBatch | None, ...]
    targets: int  # of all workers' rows
    sequences: int  # likewise
    learning_rate: float
    protected: tuple[Tensor | None, ...] = ()  # of each micro-batch, tokens that are never dropped


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did, the same on every worker."""

    step: int
    loss: float  # mean cross entropy over the step's targets, nats
    balance: float  # balance losses, coefficients included
    grad_norm: float  # before clipping
    dropped: int  # slots
    slots: int
    rows_LE: Tensor = field(repr=False)  # int64, of each MoE layer's experts
    hosts_lost: tuple[str, ...] = ()


class NotFinite(ValueError):
    """The loss or a gradient is not a finite number; no parameter was stepped."""


class Placements(Protocol):
    """Where worker 0 gets tables from."""

    def newest(self, wait: bool) -> Placement:
        """The newest table; with `wait`, once a newer one had time to come. Raises StepLost past a deadline."""

    def used(self, placement: Placement) -> None:
        """From now on this one is used, and none that is older."""


class TrainingWorker:
    """Needs a coordinator and placements where its rank is 0."""

    def __init__(
        self,
        ranks: Ranks,
        decoder: TrainingDecoder,
        client: TrainingClient,
        optimizer: DenseOptimizer,
        clip: float | None,
        coordinator: Coordinator | None = None,
        placements: Placements | None = None,
        before_dense_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Gradients are scaled to a global norm of at most `clip`; `before_dense_step` waits for who still reads."""
        self._ranks = ranks
        self._decoder = decoder
        self._client = client
        self._optimizer = optimizer
        self._clip = clip
        self._coordinator = coordinator
        self._placements = placements
        self._before_dense_step = before_dense_step

    def step(self, plan: StepPlan) -> StepReport:
        """Raises StepLost, on every worker, when experts were lost; NotFinite when the step would spoil the model."""
        try:
            return self._step(plan)
        except (StepLost, NotFinite):
            self._optimizer.drop_gradients()
            raise

    def _step(self, plan: StepPlan) -> StepReport:
        placement = self._agree_on_hosts(plan)
        if self._placements is not None:
            self._placements.used(placement)
        hosts = self._client.begin(plan.step, placement)
        sums, rows_LE = self._gradients(plan)
        together = self._tell(sums)
        self._ranks.sum([rows_LE])
        loss = sum(each["cross_entropy"] for each in together) / plan.targets
        balance = sum(each["balance"] for each in together) / plan.sequences
        dense_squared = self._optimizer.sum_gradients()
        norm, lost_at_step = self._step_hosts(hosts, plan, loss, dense_squared)
        self._before_dense_step()
        self._optimizer.step(plan.learning_rate, self._scale(norm))
        return StepReport(
            step=plan.step,
            loss=loss,
            balance=balance,
            grad_norm=norm,
            dropped=sum(each["dropped"] for each in together),
            slots=sum(each["slots"] for each in together),
            rows_LE=rows_LE.long(),
            hosts_lost=tuple(sorted({*lost_at_step, *(host for each in together for host in each["failed"])})),
        )

    def _agree_on_hosts(self, plan: StepPlan) -> Placement:
        """The table of this step, whose hosts have all begun it."""
        message: dict[str, Any] = {}
        if self._coordinator is not None:
            try:
                message["placement"] = self._begin_on_hosts(self._coordinator, plan).to_json()
            except ExpertError as error:
                message["lost"] = str(error)
        return Placement.from_json(self._tell(message)[0]["placement"])

    def _begin_on_hosts(self, coordinator: Coordinator, plan: StepPlan) -> Placement:
        assert self._placements is not None
        placement = self._placements.newest(wait=False)
        while True:
            try:
                coordinator.bring_level(placement, plan.step)
                coordinator.begin(placement, plan.step, len(plan.micro_batches), self._ranks.world)
            except Coordinator.LOST:
                placement = self._placements.newest(wait=True)
            else:
                return placement

    def _gradients(self, plan: StepPlan) -> tuple[dict[str, Any], Tensor]:
        config = self._decoder.config
        layers = config.moe_layers
        rows_LE = torch.zeros(len(layers), config.n_routed_experts)
        sums: dict[str, Any] = {"cross_entropy": 0.0, "balance": 0.0, "dropped": 0, "slots": 0}
        protected = plan.protected or (None,) * len(plan.micro_batches)
        try:
            for micro, batch in enumerate(plan.micro_batches):
                if batch is None:
                    self._client.skip(micro)
                    continue
                losses = self._decoder.losses(batch, micro, protected[micro])
                (losses.cross_entropy / plan.targets + losses.balance / plan.sequences).backward()
                sums["cross_entropy"] += losses.cross_entropy.item()
                sums["balance"] += losses.balance.item()
                sums["dropped"] += losses.dropped
                sums["slots"] += losses.slots
                for place, layer in enumerate(layers):
                    chosen_S = losses.routings[layer].experts_TK.reshape(-1).cpu()
                    rows_LE[place] += torch.bincount(chosen_S, minlength=config.n_routed_experts)
        except ExpertError as error:
            sums["lost"] = str(error)
        self._decoder.dense.take_gradients()
        sums["failed"] = [host.id for host in self._client.hosts.failed]
        return sums, rows_LE

    def _step_hosts(
        self, hosts: StepHosts, plan: StepPlan, loss: float, dense_squared: float
    ) -> tuple[float, list[str]]:
        """Step the experts; the global gradient norm and the hosts that failed, the same on every worker."""
        message: dict[str, Any] = {}
        if self._coordinator is not None:
            try:
                norm = math.sqrt(dense_squared + self._coordinator.squared_norm(hosts))
                message["norm"] = norm
                if math.isfinite(loss) and math.isfinite(norm):
                    self._coordinator.apply(hosts, plan.learning_rate, self._scale(norm))
                else:
                    message["bad"] = f"step {plan.step}: the loss is {loss} and the gradient norm {norm}"
            except ExpertError as error:
                message["lost"] = str(error)
            message["failed"] = [host.id for host in hosts.failed]
        answer = self._tell(message)[0]
        if "bad" in answer:
            raise NotFinite(f"{answer['bad']}; nothing was stepped: lower the learning rate, or look at the data")
        return float(answer["norm"]), answer["failed"]

    def _scale(self, norm: float) -> float:
        return min(1.0, self._clip / norm) if self._clip is not None and norm > 0 else 1.0

    def _tell(self, message: dict[str, Any]) -> Sequence[dict[str, Any]]:
        """Every worker's message; raises StepLost on all of them when one of them lost experts."""
        messages = [json.loads(each) for each in self._ranks.gather(json.dumps(message))]
        for rank, each in enumerate(messages):
            if "lost" in each:
                raise StepLost(f"worker {rank}: {each['lost']}")
        return messages
