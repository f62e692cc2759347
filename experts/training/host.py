"""An expert host while it trains: forward as ever, and backward, step and state of the experts that it holds."""

import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.errors import HostRefused
from experts.host import ExpertHost
from experts.training.adamw import squared_norm, step_parameters
from experts.training.expert import Contribution, TrainedExpert
from experts.training.ledger import Gains, StepLedger
from experts.training.messages import BackwardReply, BackwardRequest
from experts.training.spec import ExpertTraining
from experts.training.store import TrainableExperts, rows_by_expert
from model.checkpoint import Checkpoint
from router.holding import Pair

CLOSED = "its experts are not at the step that is trained"


@dataclass(frozen=True, slots=True)
class HostState:
    """`versions` counts the steps that each held expert has made in this run; -1 where none was begun."""

    run_id: str | None
    versions: Mapping[Pair, int]


class TrainingHost:
    """Around one life of a host whose store is `TrainableExperts`. Its methods may be called from several threads.

    All but `state` raise HostRefused as `not_ready` when the host is not where the call needs it.
    """

    def __init__(self, host: ExpertHost) -> None:
        self.host = host
        self._training: ExpertTraining | None = None
        self._members: frozenset[Pair] = frozenset()  # of the step
        self._ledger: StepLedger | None = None
        self._reading = threading.Lock()  # held while states are read: nothing steps meanwhile; taken before computing
        host.closed = CLOSED

    def configure(self, training: ExpertTraining) -> None:
        """Begin a run with the weights held now, at version 0. The same run again is left as it is, without waiting."""
        if self._training == training:
            return  # as before each step, while whoever reads states may hold the lock
        with self._reading, self.host.computing():
            if self._training == training:
                return
            self._training = None
            self._close()
            for pair in self.host.held:
                self.expert(pair).configure(pair, training)
            self._training = training  # only now may a call pass by

    def status(self) -> HostState:
        held = self.host.held
        run_id = self._training.run_id if self._training is not None else None
        return HostState(run_id, {pair: self.expert(pair).version for pair in held})

    def begin(self, step: int, micros: int, ranks: int, pairs: Collection[Pair]) -> None:
        """Take gradients of these pairs for this step, from nothing; what an attempt at it left is dropped.

        Refused when one of them is not held, or not at this step.
        """
        with self.host.computing():
            training = self._run()
            held = set(self.host.held)
            for pair in pairs:
                version = self.expert(pair).version if pair in held else None
                if version != step:
                    found = "not held" if version is None else f"at step {version}"
                    raise self._refusal(f"expert {pair} is {found}; step {step} was to begin")
            self._close()
            for pair in pairs:
                self.expert(pair).begin(ranks if training.keeps else 0)  # each worker has one micro-batch under way
            self._ledger = StepLedger(step, micros, ranks)
            self._members = frozenset(pairs)
            self.host.closed = None

    def backward(
        self, request: BackwardRequest, out: Callable[[int], tuple[Tensor, Tensor]] | None = None
    ) -> BackwardReply:
        """Gradients for the rows of the answered pairs; the experts' own gradients gain each request once, by `settle`.

        `out` says where dx [A, D] and dweight [A], fp32 on CPU, of so many answered pairs are wanted. Refused as
        `bad_request` when it is malformed.
        """
        self.settle()
        with self.host.computing(), torch.no_grad():
            ledger = self._check(request)
            turn = ledger.turn(request.micro, request.rank)
            device = self.host.device
            x_RD, dout_RD = request.x_RD.to(device), request.dout_RD.to(device)
            pair_row_P, weight_P = request.pair_row_P.to(device), request.pair_weight_P.to(device)
            answer_P = request.answer_P.bool()
            place_P = torch.cumsum(request.answer_P, 0) - 1
            answered = int(request.answer_P.sum())
            if out is None:
                dx_AD, dweight_A = torch.empty(answered, x_RD.shape[1]), torch.empty(answered)
            else:
                dx_AD, dweight_A = out(answered)
            gains: dict[int, Contribution] = {}
            for expert, pair_N in rows_by_expert(request.pair_expert_P):
                row_N = pair_row_P[pair_N]
                dx_ND, dweight_N, gains[expert] = self.expert((request.layer, expert)).backward(
                    x_RD.index_select(0, row_N), dout_RD.index_select(0, row_N), weight_P[pair_N]
                )
                wanted_N = answer_P[pair_N]
                if not wanted_N.all():
                    pair_N, dx_ND, dweight_N = pair_N[wanted_N], dx_ND[wanted_N], dweight_N[wanted_N]
                dx_AD.index_copy_(0, place_P[pair_N], dx_ND.cpu())
                dweight_A.index_copy_(0, place_P[pair_N], dweight_N.cpu())
            ledger.add(request.layer, turn, gains)
        return BackwardReply(self.host.generation, dx_AD, dweight_A)

    def settle(self) -> None:
        """Add to the experts' gradients what `backward` left: a caller has its reply before that, and goes on."""
        with self.host.computing(), torch.no_grad():
            if self._ledger is None:
                return
            try:
                self._ledger.settle(self._accumulate)
            except BaseException:  # no memory, a device that failed: gradients lack something
                self._close()
                raise

    def squared_norms(self, step: int) -> dict[Pair, float]:
        """Squared gradient norm of each expert of the step; refused until every micro-batch of every worker came."""
        self.settle()
        with self.host.computing():
            ledger = self._at(step)
            missing = ledger.missing({layer for layer, _ in self._members})
            if missing:
                layer, micro, rank = missing[0]
                raise self._refusal(f"step {step}: micro-batch {micro} of worker {rank} is missing in layer {layer}")
            experts = {pair: self.expert(pair) for pair in sorted(self._members)}
            return {pair: squared_norm(list(expert.parameters.values())) for pair, expert in experts.items()}

    def apply(self, step: int, learning_rate: float, grad_scale: float) -> None:
        """Step every expert of this step; one that has made it already is left alone, so it may be asked again."""
        self.settle()
        with self._reading, self.host.computing(), torch.no_grad():
            training = self._run()
            if self._ledger is None:
                raise self._refusal(f"no step is under way; step {step} was to be made")
            self.host.closed = CLOSED
            for pair in sorted(self._members):
                expert = self.expert(pair)
                if expert.version == step + 1:
                    continue
                if expert.version != step or self._ledger.step != step:
                    raise self._refusal(
                        f"expert {pair} is at step {expert.version}, without the gradients of step {step}"
                    )
                parameters = list(expert.parameters.values())
                step_parameters(parameters, training.adamw, learning_rate, grad_scale, step)
                expert.stepped()

    def reading(self) -> AbstractContextManager[object]:
        """While it is held, no expert steps or is replaced: for whoever reads states."""
        return self._reading

    def state(self, pair: Pair) -> tuple[int, dict[str, Tensor]]:
        """Version and tensors of one expert, to be read only, under `reading`; raises KeyError where none was begun."""
        return self._begun(pair).version, self._begun(pair).state()

    def learned(self, pair: Pair) -> tuple[int, dict[str, Tensor]]:
        """The same without what stays as the checkpoint has it."""
        return self._begun(pair).version, self._begun(pair).learned()

    def learned_names(self, pair: Pair) -> list[str]:
        """What `learned` of an expert has in this run; refused before `configure`."""
        training = self._run()
        expert = self.expert(pair)
        if expert.version < 0:
            expert.configure(pair, training)
        return list(expert.learned())

    def adopt(self, pair: Pair, version: int, state: Mapping[str, Tensor]) -> None:
        """Go on with another holder's expert, or a snapshot's; raises ValueError when it does not fit."""
        with self._reading, self.host.computing(), torch.no_grad():
            training = self._run()
            self._close()
            expert = self.expert(pair)
            expert.configure(pair, training)
            expert.restore(state, version)

    def restart(self, checkpoint: Checkpoint, pairs: Collection[Pair]) -> None:
        """Begin again at version 0, with the checkpoint's weights."""
        with self._reading, self.host.computing(), torch.no_grad():
            training = self._run()
            self._close()
            for pair in pairs:
                expert = self.expert(pair)
                expert.replace(checkpoint.expert(*pair))
                expert.configure(pair, training)

    def expert(self, pair: Pair) -> TrainedExpert:
        """Raises KeyError when it is not held."""
        store = self.host.store(pair[0])
        assert isinstance(store, TrainableExperts)
        return store.expert(pair[1])

    def _begun(self, pair: Pair) -> TrainedExpert:
        if pair not in self.host.held or self.expert(pair).version < 0:
            raise KeyError(f"{self.host.host_id} has not begun to train {pair}")
        return self.expert(pair)

    def _accumulate(self, layer: int, gains: Gains) -> None:
        for expert, gained in gains.items():
            self.expert((layer, expert)).accumulate(gained)

    def _close(self) -> None:
        self._ledger = None
        self._members = frozenset()
        self.host.closed = CLOSED

    def _check(self, request: BackwardRequest) -> StepLedger:
        host = self.host
        if request.generation != host.generation:
            raise HostRefused(
                "wrong_generation",
                f"{host.host_id} is in generation {host.generation}; the request was for {request.generation}",
            )
        ledger = self._at(request.step)
        rows, hidden = request.x_RD.shape
        if hidden != host.hidden_size:
            raise HostRefused("bad_request", f"rows are {hidden} wide; expected {host.hidden_size}")
        if not 0 <= request.micro < ledger.micros or not 0 <= request.rank < ledger.ranks:
            raise HostRefused(
                "bad_request",
                f"micro-batch {request.micro} of worker {request.rank}; the step has {ledger.micros} on {ledger.ranks}",
            )
        if len(request.pair_row_P) and not 0 <= int(request.pair_row_P.min()) <= int(request.pair_row_P.max()) < rows:
            raise HostRefused("bad_request", f"a pair names a row outside the {rows} rows sent")
        strangers = {(request.layer, expert) for expert in request.pair_expert_P.unique().tolist()} - self._members
        if strangers:
            raise HostRefused("not_held", f"{host.host_id} does not train {min(strangers)} in this step")
        return ledger

    def _at(self, step: int) -> StepLedger:
        if self._ledger is None or self._ledger.step != step:
            at = self._ledger.step if self._ledger is not None else None
            raise self._refusal(f"it is in step {at}; the call was for step {step}")
        return self._ledger

    def _run(self) -> ExpertTraining:
        if self._training is None:
            raise self._refusal("no training run was begun here")
        return self._training

    def _refusal(self, reason: str) -> HostRefused:
        return HostRefused("not_ready", f"{self.host.host_id}: {reason}")
