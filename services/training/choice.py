"""Which experts ESFT trains (arXiv 2407.01906): those that the task's tokens go to."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention.training.decoder import TrainingDecoder
from attention.training.segments import MicroBatch
from experts.training.spec import as_pairs
from model.snapshots.errors import SnapshotError
from model.snapshots.history import snapshots
from router.gate import Routing
from router.holding import Pair
from services.training.identity import Identity, differences
from services.training.outcome import SNAPSHOTS, read_kept, write_whole

CHOSEN = "experts.json"


def relevance(decoder: TrainingDecoder, batches: Sequence[MicroBatch], by: str) -> dict[int, Tensor]:
    """Of each MoE layer's experts [E] fp64, adding up to 1: average weight of the chosen, or share of the slots.

    Averages are taken over the tokens of a sample, and then over samples, with nothing dropped. The experts must be at
    hand as in a step.
    """
    decoder = decoder.plain()
    experts = decoder.config.n_routed_experts
    totals = {layer: torch.zeros(experts, dtype=torch.float64) for layer in decoder.config.moe_layers}
    with torch.no_grad():
        for micro, batch in enumerate(batches):
            lengths = torch.tensor(batch.lengths)
            share_T = (1.0 / lengths.double()).repeat_interleave(lengths)
            for layer, routing in decoder.losses(batch, micro).routings.items():
                add_relevance(totals[layer], routing, share_T, by)
    return {layer: total / total.sum() for layer, total in totals.items()}


def add_relevance(total_E: Tensor, routing: Routing, share_T: Tensor, by: str) -> None:
    """Add what the tokens' slots say, each token counted `share_T` times."""
    experts_TK, weights_TK = routing.experts_TK.cpu(), routing.weights_TK.double().cpu()
    counted_TK = share_T[:, None] * (weights_TK if by == "gate" else torch.ones_like(weights_TK))
    total_E.index_add_(0, experts_TK.reshape(-1), counted_TK.reshape(-1))


def choose(relevance_E: Tensor, share: float) -> list[int]:
    """The fewest experts whose relevance adds up to `share`, the most relevant first; ties go to the lower number."""
    ordered, index = relevance_E.sort(descending=True, stable=True)
    reached = ordered.cumsum(0)
    count = int((reached < share - 1e-12).sum()) + 1
    return sorted(index[:count].tolist())


def chosen_pairs(found: dict[int, Tensor], share: float) -> tuple[Pair, ...]:
    """(layer, expert) of all layers."""
    return tuple((layer, expert) for layer, relevance_E in found.items() for expert in choose(relevance_E, share))


def choose_once(output_dir: Path, identity: Identity, look: Callable[[], tuple[Pair, ...]]) -> tuple[Pair, ...]:
    """What `look` finds, or found before in this run: a resumed one must train the same experts.

    Another choice, model or data is looked at anew; raises SnapshotError where there are snapshots of the earlier one.
    """
    path = output_dir / CHOSEN
    kept = read_kept(path)
    known = isinstance(kept, dict) and isinstance(kept.get("by"), dict) and "pairs" in kept
    now = _chosen_by(identity, identity.model_as(str(kept["by"].get("model"))) if known else identity.model)
    changed = next(differences(kept["by"], now, ()), None) if known else None
    if known and changed is None:
        return as_pairs(kept["pairs"])
    if snapshots(output_dir / SNAPSHOTS):
        why = f"were chosen otherwise: {changed}" if changed else "are not known any more"
        raise SnapshotError(f"the experts of {output_dir} {why}; give the same recipe, or another output_dir")
    pairs = look()
    write_whole(path, json.dumps({"by": _chosen_by(identity, identity.model), "pairs": pairs}))
    return pairs


def _chosen_by(identity: Identity, model: str) -> dict[str, Any]:
    return {**identity.recipe["esft"], "data": identity.data, "model": model}
