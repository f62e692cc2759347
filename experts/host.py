"""An expert host: a stateless calculator of the experts it holds. Rows in, rows out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experts.errors import HostRefused
from experts.held import HeldExperts, MakeStore
from experts.messages import ForwardReply, ForwardRequest
from kernels.experts import PackedExperts
from kernels.lane import Asked
from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class HostStats:
    """What one life of a host has held and computed."""

    experts: int  # (layer, expert) pairs held
    nbytes: int
    requests: int
    rows: int
    pairs: int


class ExpertHost(HeldExperts):
    """One life (generation) of a host. Its methods may be called from several threads, beside one another."""

    def __init__(
        self,
        config: ModelConfig,
        host_id: str,
        generation: int,
        device: str = "cpu",
        make_store: MakeStore = PackedExperts,
    ) -> None:
        super().__init__(config, host_id, device, make_store)
        self.generation = generation
        self.closed: str | None = None  # why rows are refused for now
        self._requests = self._rows = self._pairs = 0

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
    def hidden_size(self) -> int:
        return self._config.hidden_size

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
