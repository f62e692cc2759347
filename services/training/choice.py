"""Which experts ESFT trains (arXiv 2407.01906): those that the task's tokens go to."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.training.decoder import TrainingDecoder
from attention.training.segments import MicroBatch
from router.holding import Pair


def relevance(decoder: TrainingDecoder, batches: Sequence[MicroBatch], by: str) -> dict[int, Tensor]:
    """Of each MoE layer's experts [E] fp64, adding up to 1: average gate score, or share of the chosen slots.

    The experts must be at hand as in a step. Gate scores are those of the chosen experts, as the paper's eq 5 has them.
    """
    totals = {
        layer: torch.zeros(decoder.config.n_routed_experts, dtype=torch.float64) for layer in decoder.config.moe_layers
    }
    with torch.no_grad():
        for micro, batch in enumerate(batches):
            for layer, routing in decoder.losses(batch, micro).routings.items():
                experts_S = routing.experts_TK.reshape(-1).cpu()
                weights_S = (
                    routing.weights_TK.reshape(-1).double().cpu()
                    if by == "gate"
                    else torch.ones(len(experts_S)).double()
                )
                totals[layer].index_add_(0, experts_S, weights_S)
    return {layer: total / total.sum() for layer, total in totals.items()}


def choose(relevance_E: Tensor, share: float) -> list[int]:
    """The fewest experts whose relevance adds up to `share`, the most relevant first; ties go to the lower number."""
    ordered, index = relevance_E.sort(descending=True, stable=True)
    reached = ordered.cumsum(0)
    count = int((reached < share - 1e-12).sum()) + 1
    return sorted(index[:count].tolist())


def chosen_pairs(found: dict[int, Tensor], share: float) -> tuple[Pair, ...]:
    """(layer, expert) of all layers."""
    return tuple((layer, expert) for layer, relevance_E in found.items() for expert in choose(relevance_E, share))
