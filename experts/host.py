"""An expert host: a stateless calculator of the experts it holds. Rows in, rows out."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

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
    """One life (generation) of a host. `forward` may be called from several threads."""

    def __init__(self, config: ModelConfig, host_id: str, generation: int, device: str = "cpu") -> None:
        self.host_id = host_id
        self.generation = generation
        self._config = config
        self._device = device
        self._layers: dict[int, PackedExperts] = {}
        self._compute = threading.Lock()  # kernels use the host's whole thread budget
        self._requests = self._rows = self._pairs = 0

    def load(self, checkpoint: Checkpoint, held: Iterable[tuple[int, int]], progress: Progress | None = None) -> None:
        """Read the named (layer, expert) pairs from disk, one expert at a time."""
        wanted = list(held)
        for done, (layer, expert) in enumerate(wanted, start=1):
            target = self._layer(layer)
            weights = checkpoint.expert(layer, expert)
            target.load(expert, weights.gate_proj, weights.up_proj, weights.down_proj)
            if progress is not None:
                progress(done, len(wanted))

    def unload(self, held: Iterable[tuple[int, int]]) -> None:
        """Drop the named pairs; raises KeyError for one that is not held."""
        for layer, expert in held:
            self._layers[layer].unload(expert)

    @property
    def held(self) -> tuple[tuple[int, int], ...]:
        return tuple((layer, expert) for layer, experts in self._layers.items() for expert in experts.experts)

    def forward(self, request: ForwardRequest) -> ForwardReply:
        """Each pair's expert applied to its row; raises HostRefused when this life cannot serve the request."""
        self._check(request)
        with self._compute, torch.inference_mode():
            x_RD = request.x_RD.to(self._device)
            y_PD = self._layers[request.layer](
                x_RD, request.pair_row_P.to(self._device), request.pair_expert_P.to(self._device)
            )
            self._requests += 1
            self._rows += len(x_RD)
            self._pairs += len(y_PD)
        return ForwardReply(self.generation, y_PD.cpu())

    def stats(self) -> HostStats:
        return HostStats(
            experts=len(self.held),
            nbytes=sum(experts.nbytes for experts in self._layers.values()),
            requests=self._requests,
            rows=self._rows,
            pairs=self._pairs,
        )

    def _layer(self, layer: int) -> PackedExperts:
        if layer not in self._layers:
            if layer not in self._config.moe_layers:
                raise ValueError(f"layer {layer} has no routed experts; MoE layers are {self._config.moe_layers}")
            self._layers[layer] = PackedExperts(
                self._config.hidden_size, self._config.moe_intermediate_size, self._device
            )
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
        if int(request.pair_row_P.min()) < 0 or int(request.pair_row_P.max()) >= rows:
            raise HostRefused("bad_request", f"a pair names a row outside the {rows} rows sent")
        held = set(self._layers[request.layer].experts) if request.layer in self._layers else set()
        missing = sorted(set(request.pair_expert_P.tolist()) - held)
        if missing:
            raise HostRefused("not_held", f"{self.host_id} does not hold experts {missing} of layer {request.layer}")
