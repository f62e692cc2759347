"""The decoder on the attention side: everything of the model but the routed experts.

Shapes: `T` tokens of a step, `D` model, `L` rows that want logits, `V` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.absorbed import AbsorbedAttention
from attention.batch import StepBatch
from attention.cache import LatentCache
from experts.client import ExpertClient, PlacementSource
from experts.dispatch import Dispatch
from experts.near import NearHosts
from kernels.linear import PackedLinear
from kernels.norm import rms_norm
from kernels.packed import kept_dtype
from kernels.swiglu import PackedSwiglu
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from router.gate import route
from router.placement import Placement

Progress = Callable[[int, int], None]
HALF_ROWS = 16  # of an expert on average, in a half: the packed product slows down with fewer
BESIDE = 2  # hosts that compute on the cores of attention: so few keep them all busy, of more some wait for the fullest


def halving_rows(config: ModelConfig) -> int:
    """Tokens of a step from which halves in turn are worth it, where the experts are in other processes."""
    return 2 * HALF_ROWS * config.n_routed_experts // max(1, config.num_experts_per_tok)


def dense_mlp(checkpoint: Checkpoint, prefix: str, dtype: torch.dtype, device: str) -> PackedSwiglu:
    """The network of a dense layer, or the shared experts'."""
    gate, up, down = (
        read_weight(checkpoint, f"{prefix}.{name}_proj.weight", dtype, device) for name in ("gate", "up", "down")
    )
    return PackedSwiglu(gate, up, down)


def read_weight(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: str) -> Tensor:
    """A matrix on its device: on CPU in its own dtype, which the kernels keep where they can, else as `dtype`.

    On CPU it may be the checkpoint's file itself, to be copied by whoever keeps it.
    """
    return checkpoint.tensor(name).to(device, None if device == "cpu" else dtype)


def read_embedding(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Tensor:
    """The embedding, [V, D], on its device."""
    read = checkpoint.tensor("model.embed_tokens.weight")
    return read.to(device, kept_dtype(read.dtype) if device == "cpu" else dtype, copy=True)


def read_norm(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: str) -> Tensor:
    """A norm's weight on its device, as `dtype`."""
    return checkpoint.tensor(name).to(device, dtype, copy=True)


class DecoderLayer:
    """One layer: attention, then a dense MLP, or gate, routed experts (elsewhere) and shared experts (here)."""

    def __init__(self, checkpoint: Checkpoint, layer: int, dtype: torch.dtype, device: str) -> None:
        config = checkpoint.config
        prefix = f"model.layers.{layer}"
        self._layer = layer
        self._config = config
        self._input_norm = read_norm(checkpoint, f"{prefix}.input_layernorm.weight", dtype, device)
        self._post_norm = read_norm(checkpoint, f"{prefix}.post_attention_layernorm.weight", dtype, device)
        self._attention = AbsorbedAttention(checkpoint, layer, dtype, device)
        self._gate: PackedLinear | None = None
        self._mlp: PackedSwiglu | None = None
        if config.is_moe(layer):
            gate = checkpoint.tensor(f"{prefix}.mlp.gate.weight").float()  # fp32 whatever the checkpoint's dtype
            self._gate = PackedLinear(gate.to(device))
            if config.n_shared_experts:
                self._mlp = dense_mlp(checkpoint, f"{prefix}.mlp.shared_experts", dtype, device)
        else:
            self._mlp = dense_mlp(checkpoint, f"{prefix}.mlp", dtype, device)

    def begin(
        self, h_TD: Tensor, batch: StepBatch, cache: LatentCache, experts: ExpertClient, placement: Placement
    ) -> "Underway":
        """All that is computed here; the rows of a layer of experts are then with the hosts."""
        eps = self._config.rms_norm_eps
        h_TD = self._attention(rms_norm(h_TD, self._input_norm, eps), h_TD, batch, cache)
        x_TD = rms_norm(h_TD, self._post_norm, eps)
        if self._gate is None:
            assert self._mlp is not None
            return Underway(self._mlp(x_TD, h_TD))
        routing = route(self._gate(x_TD.float()), self._config)
        dispatch = experts.start(self._layer, x_TD, routing, placement)
        shared_TD = self._mlp(x_TD) if self._mlp is not None else None  # while the rows are with the hosts
        return Underway(h_TD, dispatch, shared_TD)


@dataclass(frozen=True, slots=True, eq=False)
class Underway:
    """A layer that has begun; without a dispatch, it is over."""

    h_TD: Tensor  # the layer's output, or to be added to that of the experts
    dispatch: Dispatch | None = None
    shared_TD: Tensor | None = None

    def end(self) -> Tensor:
        """The layer's output, [T, D]; raises as `Dispatch.finish` does."""
        if self.dispatch is None:
            return self.h_TD
        return self.dispatch.finish(self.shared_TD, self.h_TD).to(self.h_TD.dtype)

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        if self.dispatch is not None:
            self.dispatch.abandon()


class Decoder:
    """Token ids in, logits out, for one step's batch."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: ExpertClient,
        placements: PlacementSource,
        device: str = "cpu",
        progress: Progress | None = None,
        halve_from: int | None = None,
    ) -> None:
        """A step of `halve_from` tokens or more is computed as two halves in turn: hosts compute one while the other
        is attended to here, and the same bits come out; but not beside one or two hosts of the same cores. None: never,
        as where the experts are in this process.
        """
        config = checkpoint.config
        # CPUs compute in fp32 whatever the checkpoint's dtype: bf16 is far slower there.
        dtype = torch.float32 if device == "cpu" else checkpoint.tensor("model.norm.weight").dtype
        self.config = config
        self.dtype = dtype
        self.device = device
        self._experts = experts
        self._placements = placements
        self._halve_from = halve_from
        self._embedding_VD = read_embedding(checkpoint, dtype, device)
        self._layers: list[DecoderLayer] = []
        for layer in range(config.num_hidden_layers):
            self._layers.append(DecoderLayer(checkpoint, layer, dtype, device))
            if progress is not None:
                progress(layer + 1, config.num_hidden_layers)
        self._norm = read_norm(checkpoint, "model.norm.weight", dtype, device)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        # in fp32: as bf16, the likeliest tokens would often be alike
        self._head = PackedLinear(read_weight(checkpoint, head, dtype, device), torch.float32)

    def placement(self) -> Placement:
        """The newest table."""
        return self._placements.snapshot()

    def near_hosts(self, placement: Placement) -> NearHosts | None:
        """The hosts of a table, where all are in this process and compute on its GPU."""
        return self._experts.near(placement, self._embedding_VD.device)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: LatentCache, placement: Placement | None = None) -> Tensor:
        """Compute the step's latents into `cache`; logits [L, V] fp32 of the rows that want them.

        The whole step uses one placement table: the given one, else a snapshot of the newest. Raises
        ExpertsUnavailable when the holders of some expert stayed unreachable for the client's whole deadline; the
        cache slots of this step's tokens are then undefined, all others unharmed.
        """
        placement = self.placement() if placement is None else placement
        halved = self._halves(len(batch), placement)
        parts = batch.halves() if halved else (batch,)
        underway = [Underway(self._embedding_VD[part.token_T].to(self.dtype)) for part in parts]
        try:
            for layer in self._layers:
                for index, part in enumerate(parts):  # the second may attend to what the first has written
                    underway[index] = layer.begin(underway[index].end(), part, cache, self._experts, placement)
            h_TD = torch.cat([each.end() for each in underway]) if halved else underway[0].end()
        finally:
            for each in underway:  # of which an error left some
                each.abandon()
        rows_LD = rms_norm(h_TD[batch.logit_row_L], self._norm, self.config.rms_norm_eps)
        return self._head(rows_LD).float()

    def _halves(self, tokens: int, placement: Placement) -> bool:
        if self._halve_from is None or tokens < max(2, self._halve_from):
            return False
        return self.device != "cpu" or not 0 < self._experts.beside(placement) <= BESIDE
