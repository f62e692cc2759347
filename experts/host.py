"""An expert host: a stateless calculator of the experts it holds. Rows in, rows out."""

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.errors import HostRefused
from experts.messages import ForwardReply, ForwardRequest
from kernels.swiglu import PackedExperts
from model.checkpoint import Checkpoint
from model.config import ModelConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class HostStats:
    """What one life of a host has held and computed."""

    experts: int  # (layer, expert) pairs held
    nbytes: int
    requests: int
    rows: int
    pairs: int


class ExpertHost:
    """One life (generation) of a host. `forward` and `forward_batch` may be called from several threads."""

    def __init__(self, config: ModelConfig, host_id: str, generation: int, device: str = "cpu") -> None:
        self.host_id = host_id
        self.generation = generation
        self._config = config
        self._device = device
        self._layers: dict[int, PackedExperts] = {}
        self._held_E: dict[int, npt.NDArray[np.bool_]] = {}  # of each layer, the experts that can be computed
        self._compute = threading.Lock()  # kernels use the host's whole thread budget
        self._requests = self._rows = self._pairs = 0

    def load(self, checkpoint: Checkpoint, held: Iterable[tuple[int, int]], progress: Progress | None = None) -> None:
        """Read the named (layer, expert) pairs from disk, one expert at a time."""
        wanted = list(held)
        done = 0
        for layer, pairs in itertools.groupby(wanted, key=lambda pair: pair[0]):
            target = self._layer(layer)
            experts = [expert for _, expert in pairs]
            for expert, weights in zip(experts, checkpoint.experts(layer, experts), strict=True):
                target.load(expert, weights.gate_proj, weights.up_proj, weights.down_proj)
                self._held_E[layer][expert] = True
                done += 1
                if progress is not None:
                    progress(done, len(wanted))

    def unload(self, held: Iterable[tuple[int, int]]) -> None:
        """Drop the named pairs; raises KeyError for one that is not held."""
        with self._compute:
            for layer, expert in held:
                self._layers[layer].unload(expert)
                self._held_E[layer][expert] = False

    @property
    def held(self) -> tuple[tuple[int, int], ...]:
        return tuple((layer, expert) for layer, experts in self._layers.items() for expert in experts.experts)

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

    def stats(self) -> HostStats:
        return HostStats(
            experts=len(self.held),
            nbytes=sum(experts.nbytes for experts in self._layers.values()),
            requests=self._requests,
            rows=self._rows,
            pairs=self._pairs,
        )

    def _compute_layer(
        self, layer: int, requests: Sequence[ForwardRequest], outs: Sequence[Tensor | None]
    ) -> list[Tensor]:
        if len(requests) == 1:
            return [self._apply(layer, requests[0].x_RD, requests[0].pair_row_P, requests[0].pair_expert_P, outs[0])]
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
        if self._device == "cpu":
            return experts(x_RD, pair_row_P, pair_expert_P, out_PD)
        y_PD = experts(x_RD.to(self._device), pair_row_P.to(self._device), pair_expert_P.to(self._device))
        return y_PD.cpu() if out_PD is None else out_PD.copy_(y_PD)

    def _layer(self, layer: int) -> PackedExperts:
        if layer not in self._layers:
            if layer not in self._config.moe_layers:
                raise ValueError(f"layer {layer} has no routed experts; MoE layers are {self._config.moe_layers}")
            self._layers[layer] = PackedExperts(
                self._config.hidden_size, self._config.moe_intermediate_size, self._device
            )
            self._held_E[layer] = np.zeros(self._config.n_routed_experts, np.bool_)
        return self._layers[layer]

    def _check(self, request: ForwardRequest) -> None:
        if request.generation != self.generation:
            raise HostRefused(
                "wrong_generation",
                f"{self.host_id} is in generation {self.generation}; the request was for {request.generation}",
            )
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
