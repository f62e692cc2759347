"""The decoder with gradients: tokens in, losses out. The routed experts' gradients stay on their hosts.

Shapes: `T` tokens, `D` model, `E` experts, `K` experts a token, `L` tokens whose target counts, `V` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention.rope import RotaryTable
from attention.training.causal import SampleGroups
from attention.training.gated import gated
from attention.training.mla import segment_attention
from attention.training.norm import norm
from attention.training.parameters import DenseParameters
from attention.training.segments import IGNORED, MicroBatch
from experts.training.client import TrainingClient
from experts.training.function import routed_experts
from model.config import ModelConfig
from router.dropping import drop_tokens
from router.gate import Routing, route
from router.losses import BalanceCoefficients, balance_losses, gate_scores

HEAD_BYTES = 64 << 20  # of fp32 logits


def head_tokens(config: ModelConfig) -> int:
    """Tokens whose logits are in memory at once."""
    return max(1, HEAD_BYTES // (4 * config.vocab_size))


@dataclass(frozen=True, slots=True)
class ForwardOptions:
    """`checkpointing` computes attention and dense networks again in backward instead of keeping what they made."""

    balance: BalanceCoefficients = field(default_factory=BalanceCoefficients)
    drop: bool = False  # slots over a device's budget
    checkpointing: bool = False


@dataclass(slots=True)
class Losses:
    """Of one micro-batch; sums, to be divided by what the whole step has."""

    cross_entropy: Tensor  # over targets
    balance: Tensor  # over sequences and layers, coefficients included
    routings: dict[int, Routing] = field(default_factory=dict)  # of each MoE layer, without gradients
    dropped: int = 0  # slots
    slots: int = 0


class TrainingDecoder:
    """One worker's; uses the hosts of the client's step."""

    def __init__(
        self, config: ModelConfig, dense: DenseParameters, client: TrainingClient, options: ForwardOptions, length: int
    ) -> None:
        """`length` is the longest sample's. Raises ValueError for a balance loss that the model does not have."""
        self.config = config
        self.dense = dense
        self._client = client
        self._options = options
        self._length = length
        balance = options.balance
        self._balances = any((balance.expert, balance.device, balance.communication))
        balance.check(config)
        self._rotary = RotaryTable(config, length, dense["model.norm.weight"].device)

    def plain(self) -> "TrainingDecoder":
        """The same as it is when it is evaluated: nothing is dropped, and there are no losses for balance."""
        return TrainingDecoder(self.config, self.dense, self._client, ForwardOptions(), self._length)

    def losses(self, batch: MicroBatch, micro: int, protected_T: Tensor | None = None) -> Losses:
        """Forward of one micro-batch; `protected_T` marks tokens that are never dropped.

        Raises StepLost when an expert has no holder left; so may the backward of what is returned.
        """
        dense, config = self.dense, self.config
        rotation = self._rotary.at(batch.position_T)
        samples = SampleGroups(batch.lengths, batch.token_T.device)
        h_TD = F.embedding(batch.token_T, dense["model.embed_tokens.weight"])
        if not h_TD.requires_grad:  # nothing dense is trained: backward must reach the experts all the same
            h_TD.requires_grad_()
        losses = Losses(h_TD.new_zeros(()), h_TD.new_zeros(()))
        for layer in range(config.num_hidden_layers):
            h_TD = h_TD + self._again(self._attention, layer, h_TD, rotation, samples)
            x_TD = norm(h_TD, dense[f"model.layers.{layer}.post_attention_layernorm.weight"], config.rms_norm_eps)
            if config.is_moe(layer):
                h_TD = h_TD + self._experts(layer, micro, x_TD, batch, protected_T, losses)
            else:
                h_TD = h_TD + self._again(self._mlp, f"model.layers.{layer}.mlp", x_TD)
        counted = batch.target_T != IGNORED
        losses.cross_entropy = self._cross_entropy(h_TD[counted], batch.target_T[counted])
        return losses

    def _attention(self, layer: int, h_TD: Tensor, rotation: tuple[Tensor, Tensor], samples: SampleGroups) -> Tensor:
        weight = self.dense[f"model.layers.{layer}.input_layernorm.weight"]
        x_TD = norm(h_TD, weight, self.config.rms_norm_eps)
        return segment_attention(self.dense, self.config, layer, x_TD, rotation, samples)

    def _mlp(self, prefix: str, x_TD: Tensor) -> Tensor:
        gate, up = (self.dense.linear(f"{prefix}.{name}_proj", x_TD) for name in ("gate", "up"))
        return self.dense.linear(f"{prefix}.down_proj", gated(gate, up))

    def _experts(
        self, layer: int, micro: int, x_TD: Tensor, batch: MicroBatch, protected_T: Tensor | None, losses: Losses
    ) -> Tensor:
        prefix, options = f"model.layers.{layer}.mlp", self._options
        logits_TE = F.linear(x_TD.float(), self.dense[f"{prefix}.gate.weight"].float())
        routing = route(logits_TE, self.config)
        if self._balances:
            balance = balance_losses(
                gate_scores(logits_TE), routing.experts_TK, batch.ends, self.config, options.balance
            )
            losses.balance = losses.balance + balance.total
        keep_TK: Tensor | None = None
        if options.drop:
            if protected_T is None:
                protected_T = torch.zeros(len(x_TD), dtype=torch.bool, device=x_TD.device)
            affinity_TK = gate_scores(logits_TE.detach()).gather(1, routing.experts_TK)
            dropped = drop_tokens(routing.experts_TK, affinity_TK, protected_T, self.config)
            keep_TK = dropped.keep_TK
            losses.dropped += dropped.dropped
            routing = Routing(routing.experts_TK, routing.weights_TK * keep_TK)
        losses.slots += routing.experts_TK.numel()
        losses.routings[layer] = Routing(routing.experts_TK, routing.weights_TK.detach())
        dispatch = self._client.start(layer, x_TD.detach(), routing)
        shared_TD = None
        if self.config.n_shared_experts:  # while the rows are with the hosts
            shared_TD = self._again(self._mlp, f"{prefix}.shared_experts", x_TD)
        out_TD = routed_experts(self._client, dispatch, x_TD, routing, layer, micro, keep_TK).to(x_TD.dtype)
        return out_TD if shared_TD is None else out_TD + shared_TD

    def _cross_entropy(self, h_LD: Tensor, target_L: Tensor) -> Tensor:
        dense, config = self.dense, self.config
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"

        def part(h_lD: Tensor, target_l: Tensor) -> Tensor:
            rows = norm(h_lD, dense["model.norm.weight"], config.rms_norm_eps)
            return F.cross_entropy(dense.linear(head, rows).float(), target_l, reduction="sum")

        tokens = head_tokens(config)
        if len(h_LD) <= tokens:
            return part(h_LD, target_L)
        total = h_LD.new_zeros((), dtype=torch.float32)
        for h_lD, target_l in zip(h_LD.split(tokens), target_L.split(tokens), strict=True):
            total = total + checkpoint(part, h_lD, target_l, use_reentrant=False)
        return total

    def _again(self, function: Callable[..., Tensor], *given: object) -> Tensor:
        if not self._options.checkpointing:
            return function(*given)
        out: Tensor = checkpoint(function, *given, use_reentrant=False)
        return out
