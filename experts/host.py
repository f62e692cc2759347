"""An expert host: a stateless calculator of the experts it holds. Rows in, rows out."""

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.errors import HostRefused
from experts.messages import ForwardReply, ForwardRequest
from kernels.experts import PackedExperts
from kernels.lane import Asked
from kernels.native import triton_serves
from model.checkpoint import Checkpoint, ExpertWeights
from model.config import ModelConfig
from router.holding import Pair

Progress = Callable[[int, int], None]


class ExpertStore(Protocol):
    """One layer's experts in memory; see `kernels.experts.PackedExperts`."""

    merges: bool  # whether a row's bits are the same whatever rows are computed with it

    @property
    def nbytes(self) -> int: ...

    def unpacked_dtype(self, dtypes: Sequence[torch.dtype]) -> torch.dtype: ...

    def load(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None: ...

    def unload(self, expert: int) -> None: ...

    def unpack(self, expert: int) -> tuple[Tensor, Tensor, Tensor]: ...

    def answer(self, lane: int, asked: Asked, held_E: int) -> bool: ...

    def __call__(
        self, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor, out_PD: Tensor | None = None
    ) -> Tensor: ...


MakeStore = Callable[[int, int, str], ExpertStore]  # hidden size, intermediate size, device


@dataclass(frozen=True, slots=True)
class HostStats:
    """What one life of a host has held and computed."""

    experts: int  # (layer, expert) pairs held
    nbytes: int
    requests: int
    rows: int
    pairs: int


class ExpertHost:
    """One life (generation) of a host. Its methods may be called from several threads, beside one another."""

    def __init__(
        self,
        config: ModelConfig,
        host_id: str,
        generation: int,
        device: str = "cpu",
        make_store: MakeStore = PackedExperts,
    ) -> None:
        self.host_id = host_id
        self.generation = generation
        self.device = device
        self.closed: str | None = None  # why rows are refused for now
        self.changes = 0  # experts that were taken or dropped
        self._config = config
        self._make_store = make_store
        self._layers: dict[int, ExpertStore] = {}
        self._held_E: dict[int, npt.NDArray[np.bool_]] = {}  # of each layer, the experts that can be computed
        self._held_address: dict[int, int] = {}  # of those, for native code
        self._held: dict[Pair, int] = {}  # the same, with the bytes that each takes
        self._changes = threading.Lock()  # one thread at a time loads or unloads; taken before the others
        self._compute = threading.RLock()  # kernels use the host's whole thread budget
        self._counts = threading.Lock()  # guards `_held`, and is never held for long
        self._requests = self._rows = self._pairs = 0

    def load(self, checkpoint: Checkpoint, held: Iterable[Pair], progress: Progress | None = None) -> None:
        """Read those of the named (layer, expert) pairs that are not held yet from disk, one expert at a time."""
        present = set(self.held)
        wanted = [pair for pair in held if pair not in present]
        for layer, expert in wanted:
            self._check_pair(layer, expert)
        done = 0
        for layer, pairs in itertools.groupby(wanted, key=lambda pair: pair[0]):
            experts = [expert for _, expert in pairs]
            for expert, weights in zip(experts, checkpoint.experts(layer, experts), strict=True):
                self.take(layer, expert, weights)
                done += 1
                if progress is not None:
                    progress(done, len(wanted))

    def take(self, layer: int, expert: int, weights: ExpertWeights) -> bool:
        """Hold one expert; requests see it once it is complete. False when it is held already, and stays as it is.

        Raises ValueError when the model has no such expert, or one of other shapes.
        """
        self._check_pair(layer, expert)
        with self._changes:
            if (layer, expert) in self._held:
                return False  # a request may be reading it
            target = self._layer(layer)
            # a recorded step knows where a layer's table lies: it is replayed before a change of it, or not at all
            with self._compute if self.computes_slots else nullcontext():
                before = target.nbytes
                target.load(expert, weights.gate_proj, weights.up_proj, weights.down_proj)
                with self._counts:
                    self._held[layer, expert] = target.nbytes - before
                self._held_E[layer][expert] = True
                self.changes += 1
        return True

    def weights_dtype(self, layer: int, dtypes: Sequence[torch.dtype]) -> torch.dtype:
        """Of what `weights` gives, and a host like this one sends, for an expert that is stored in these dtypes."""
        with self._changes:
            return self._layer(layer).unpacked_dtype(dtypes)

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """What this host computes with, on the CPU and to be read only; its dtype is `weights_dtype`.

        Raises KeyError for an expert that is not held. One that is unloaded meanwhile is still returned whole.
        """
        experts = self._layers.get(layer)
        try:
            if experts is None or (layer, expert) not in self._held:
                raise KeyError(expert)
            return ExpertWeights(*(weight.cpu() for weight in experts.unpack(expert)))
        except KeyError:
            raise KeyError(f"{self.host_id} does not hold expert {expert} of layer {layer}") from None

    def unload(self, held: Iterable[Pair]) -> None:
        """Drop the named pairs and free their memory; raises KeyError, and drops none, when one is not held."""
        pairs = list(dict.fromkeys(held))
        with self._changes:
            for pair in pairs:
                if pair not in self._held:
                    raise KeyError(pair)
            with self._compute:  # what is being computed may have begun with them; nothing begins with them after this
                for layer, expert in pairs:
                    self._held_E[layer][expert] = False
                with self._counts:
                    for pair in pairs:
                        del self._held[pair]
                for layer, expert in pairs:
                    self._layers[layer].unload(expert)
                self.changes += len(pairs)

    @property
    def held(self) -> tuple[Pair, ...]:
        """(layer, expert) pairs, in that order."""
        with self._counts:
            pairs = tuple(self._held)
        return tuple(sorted(pairs))

    def forward(self, request: ForwardRequest) -> ForwardReply:
        """Each pair's expert applied to its row; raises HostRefused when this life cannot serve the request."""
        (answer,) = self.forward_batch((request,))
        if isinstance(answer, HostRefused):
            raise answer
        return answer

    def forward_batch(
        self, requests: Sequence[ForwardRequest], outs: Sequence[Tensor | None] | None = None
    ) -> list[ForwardReply | HostRefused]:
        """The answer to each request; those of one layer are computed in one call, and a bad one is refused alone.

        `outs[i]`, [P, D] fp32 contiguous CPU, is where the reply to `requests[i]` is wanted, and is its `y_PD` then.
        """
        answers: list[ForwardReply | HostRefused | None] = []
        by_layer: dict[int, list[int]] = {}
        with self._compute, torch.inference_mode():  # nothing is unloaded between the checks and the work
            for index, request in enumerate(requests):
                try:
                    self._check(request)
                except HostRefused as refusal:
                    answers.append(refusal)
                else:
                    answers.append(None)
                    by_layer.setdefault(request.layer, []).append(index)
            for layer, members in by_layer.items():
                wanted = [requests[index] for index in members]
                places = [outs[index] if outs is not None else None for index in members]
                for index, y_PD in zip(members, self._compute_layer(layer, wanted, places), strict=True):
                    answers[index] = ForwardReply(self.generation, y_PD)
                    self._requests += 1
                    self._rows += len(requests[index].x_RD)
                    self._pairs += len(y_PD)
        return [answer for answer in answers if answer is not None]

    def answer_in_place(self, lane: int, asked: Asked) -> bool:
        """Answer a request where it lies in a lane, as `forward_batch` would; False where that is to be called instead.

        `lane` is the address of a `kernels.lane.NativeLane`. The rows' bits are those of any other way.
        """
        with self._compute:
            store = self._layers.get(asked.layer)
            if (
                store is None
                or self.closed is not None
                or asked.generation != self.generation
                or asked.hidden != self._config.hidden_size
                or not store.answer(lane, asked, self._held_address[asked.layer])
            ):
                return False
            self._requests += 1
            self._rows += asked.rows
            self._pairs += asked.pairs
            return True

    def compute_slots(self, layer: int, x_TD: Tensor, expert_TK: Tensor, out_SD: Tensor) -> None:
        """`PackedExperts.compute_slots` of a layer, for whoever holds `computing` and knows what is held.

        Only where `computes_slots`.
        """
        store = self._layers[layer]
        assert isinstance(store, PackedExperts)
        store.compute_slots(x_TD, expert_TK, out_SD)
        self._requests += 1
        self._rows += x_TD.shape[0]
        self._pairs += out_SD.shape[0]

    @property
    def computes_slots(self) -> bool:
        """Whether a whole step's slots can be computed on this host's GPU without waiting for it."""
        return self._make_store is PackedExperts and triton_serves(self.device)

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    def store(self, layer: int) -> ExpertStore:
        """What holds a layer's experts; raises KeyError where none is held."""
        return self._layers[layer]

    def computing(self) -> AbstractContextManager[object]:
        """Nothing else is computed, and nothing unloaded, meanwhile."""
        return self._compute

    def stats(self) -> HostStats:
        with self._counts:
            experts, nbytes = len(self._held), sum(self._held.values())
        return HostStats(
            experts=experts,
            nbytes=nbytes,
            requests=self._requests,
            rows=self._rows,
            pairs=self._pairs,
        )

    def _compute_layer(
        self, layer: int, requests: Sequence[ForwardRequest], outs: Sequence[Tensor | None]
    ) -> list[Tensor]:
        if len(requests) == 1 or not self._layers[layer].merges:
            return [
                self._apply(layer, one.x_RD, one.pair_row_P, one.pair_expert_P, out)
                for one, out in zip(requests, outs, strict=True)
            ]
        first_rows = np.cumsum([0, *(len(request.x_RD) for request in requests[:-1])]).tolist()
        y_PD = self._apply(
            layer,
            torch.cat([request.x_RD for request in requests]),
            torch.cat([request.pair_row_P + first for request, first in zip(requests, first_rows, strict=True)]),
            torch.cat([request.pair_expert_P for request in requests]),
            None,
        )
        parts = y_PD.split([len(request.pair_row_P) for request in requests])
        return [part if out is None else out.copy_(part) for part, out in zip(parts, outs, strict=True)]

    def _apply(
        self, layer: int, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor, out_PD: Tensor | None
    ) -> Tensor:
        experts = self._layers[layer]
        if self.device == "cpu":
            return experts(x_RD, pair_row_P, pair_expert_P, out_PD)
        y_PD = experts(x_RD.to(self.device), pair_row_P, pair_expert_P)
        return y_PD.cpu() if out_PD is None else out_PD.copy_(y_PD)

    def _layer(self, layer: int) -> ExpertStore:
        if layer not in self._layers:
            held_E = self._held_E[layer] = np.zeros(self._config.n_routed_experts, np.bool_)
            self._held_address[layer] = held_E.ctypes.data
            # last: who computes looks for this first
            self._layers[layer] = self._make_store(
                self._config.hidden_size, self._config.moe_intermediate_size, self.device
            )
        return self._layers[layer]

    def _check_pair(self, layer: int, expert: int) -> None:
        if layer not in self._config.moe_layers:
            raise ValueError(f"layer {layer} has no routed experts; MoE layers are {self._config.moe_layers}")
        if not 0 <= expert < self._config.n_routed_experts:
            raise ValueError(f"layer {layer} has no expert {expert}; it has {self._config.n_routed_experts}")

    def _check(self, request: ForwardRequest) -> None:
        if request.generation != self.generation:
            raise HostRefused(
                "wrong_generation",
                f"{self.host_id} is in generation {self.generation}; the request was for {request.generation}",
            )
        if self.closed is not None:
            raise HostRefused("not_ready", f"{self.host_id}: {self.closed}")
        rows, hidden = request.x_RD.shape
        if hidden != self._config.hidden_size:
            raise HostRefused("bad_request", f"rows are {hidden} wide; expected {self._config.hidden_size}")
        if len(request.pair_row_P) == 0:
            raise HostRefused("bad_request", "the request names no experts")
        pair_row_P = request.pair_row_P.numpy()
        if pair_row_P.min() < 0 or pair_row_P.max() >= rows:
            raise HostRefused("bad_request", f"a pair names a row outside the {rows} rows sent")
        pair_expert_P = request.pair_expert_P.numpy()
        held_E = self._held_E.get(request.layer)
        if held_E is None or pair_expert_P.min() < 0 or pair_expert_P.max() >= len(held_E):
            missing = {expert for expert in pair_expert_P.tolist() if held_E is None or not 0 <= expert < len(held_E)}
        elif not held_E[pair_expert_P].all():
            missing = set(pair_expert_P[~held_E[pair_expert_P]].tolist())
        else:
            return
        raise HostRefused(
            "not_held", f"{self.host_id} does not hold experts {sorted(missing)} of layer {request.layer}"
        )
