"""What a run leaves: a checkpoint in Hugging Face's layout, a LoRA adapter, or a delta of the changed experts."""

import contextlib
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention.training.parameters import DenseParameters
from experts.errors import TransferFailed
from experts.training.coordinator import Coordinator
from experts.training.grpc_peer import GrpcPeers
from experts.training.states import decode_state
from experts.training.step_hosts import StepLost
from model.adapters.delta import delta_names, write_delta
from model.adapters.lora_write import write_adapter
from model.adapters.spec import lora_tensors
from model.adapters.tensor_file import DTYPES, rounded
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.export import export_checkpoint
from model.rope_fields import RopeScaling
from model.snapshots.disk import move
from model.staging import NotWritten, hidden_beside
from model.tensors import expected_tensors
from router.holding import Pair
from router.placement import Placement
from services.training.method import Method
from services.training.recipe import Recipe
from services.training.recipe_sections import Yarn

RESULTS = ("model", "adapter", "delta")  # directories, of which a run writes one
CONFIG_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TrainedModel:
    """The experts of the last step, read from their hosts one at a time, and the dense side."""

    def __init__(self, dense: DenseParameters, placement: Placement, peers: GrpcPeers, steps: int) -> None:
        self._dense = dense
        self._placement = placement
        self._peers = peers
        self._steps = steps

    def state(self, pair: Pair) -> dict[str, Tensor]:
        """Raises StepLost when no host has the expert after the run's last step."""
        last = ""
        for host in self._placement.holders(*pair):
            try:
                (message,) = self._peers.peer(host).states([pair])
                _, version, state = decode_state(message)
            except (*Coordinator.LOST, TransferFailed) as error:
                last = str(error)
                continue
            if version == self._steps:
                return state
            last = f"{host.id} has it at step {version}"
        raise StepLost(f"expert {pair} after step {self._steps}: {last}")

    def tensors(self, names: Iterator[str]) -> Iterator[tuple[str, Tensor]]:
        """By checkpoint names, an expert's three matrices read once where they follow each other."""
        dense = dict(self._dense.values())
        known: tuple[Pair, dict[str, Tensor]] | None = None
        for name in names:
            if ".mlp.experts." not in name:
                yield name, dense[name].detach()
                continue
            parts = name.split(".")
            pair, matrix = (int(parts[2]), int(parts[5])), parts[6]
            if known is None or known[0] != pair:
                known = (pair, self._matrices(pair))
            yield name, known[1][matrix]

    def factors(self, names: Iterator[str]) -> Iterator[tuple[str, Tensor]]:
        """LoRA's matrices by our names."""
        known: tuple[Pair, dict[str, Tensor]] | None = None
        for name in names:
            if ".mlp.experts." not in name:
                yield name, self._dense.trained[name].value.detach()
                continue
            parts = name.split(".")
            pair = (int(parts[2]), int(parts[5]))
            if known is None or known[0] != pair:
                known = (pair, self.state(pair))
            yield name, known[1][".".join(parts[6:])]

    def _matrices(self, pair: Pair) -> dict[str, Tensor]:
        state = self.state(pair)
        gate, up = state["gate_up_proj"].chunk(2)
        return {"gate_proj": gate, "up_proj": up, "down_proj": state["down_proj"]}


def write_result(
    out: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    raw_config: Mapping[str, Any],
    method: Method,
    model: TrainedModel,
) -> Path:
    """Write `out`/model, `out`/adapter or `out`/delta, whole or not at all; its directory. An earlier one is renamed.

    Numbers have the original's dtypes, and an adapter's are fp32. Raises CheckpointError (NotWritten), AdapterError or
    SnapshotError naming what is in the way, and StepLost.
    """
    config = checkpoint.config
    target = out / ("adapter" if method.lora is not None else "delta" if recipe.method == "esft" else "model")
    try:
        with _replacing(target) as place:
            if method.lora is not None:
                factors = model.factors(iter(lora_tensors(config, method.lora)))
                write_adapter(place, method.lora, config, factors, str(checkpoint.directory))
            elif recipe.method == "esft":
                experts: dict[int, list[int]] = defaultdict(list)
                for layer, expert in method.experts.only or ():
                    experts[layer].append(expert)
                tensors = model.tensors(iter(delta_names(experts)))
                write_delta(place, checkpoint, experts, tensors, {"recipe": recipe.model_dump(mode="json")})
            else:
                dtypes = _dtypes(recipe, checkpoint)
                named = model.tensors(iter(dtypes))
                tensors = ((name, rounded(name, tensor, dtypes[name])) for name, tensor in named)
                export_checkpoint(place, raw_config, tensors, checkpoint.directory)
    except (NotWritten, OSError) as error:
        reason = error.reason if isinstance(error, NotWritten) else str(error)
        raise NotWritten(target, f"{reason}; the same command tries again") from error
    return target


def _dtypes(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """Of each tensor of a checkpoint: as the original has it, or config.json where the weights were drawn."""
    drawn = CONFIG_DTYPES[checkpoint.config.dtype] if recipe.init == "random" else None
    return {name: drawn or DTYPES[checkpoint.entries[name].dtype] for name in expected_tensors(checkpoint.config)}


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Where to write what becomes `target` when the block ends well.

    An earlier result gets another name only then: the same run may have been shorter before.
    """
    with hidden_beside(target) as hidden:
        place = hidden / target.name
        yield place
        if target.exists():
            names = (target.with_name(f"{target.name}-{number}") for number in itertools.count(1))
            target.rename(next(name for name in names if not name.exists()))
        move(place, target)


def with_yarn(config: ModelConfig, yarn: Yarn | None) -> ModelConfig:
    """The config of the trained model where its context is extended.

    Raises ValueError where what the context is said to have been is more than the model has.
    """
    if yarn is None:
        return config
    scaling_before = config.rope_scaling
    had = scaling_before.original_max_position_embeddings if scaling_before else config.max_position_embeddings
    said = yarn.original_max_position_embeddings
    if said > had:
        raise ValueError(
            f"yarn.original_max_position_embeddings is {said}; expected at most {had}, the tokens of the model's own "
            "context"
        )
    scaling = RopeScaling(**yarn.model_dump())
    length = int(yarn.factor * yarn.original_max_position_embeddings)
    return dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=length)


def raw_with_yarn(raw: Mapping[str, Any], yarn: Yarn | None) -> dict[str, Any]:
    """The same in config.json's own words."""
    if yarn is None:
        return dict(raw)
    changed = {key: value for key, value in raw.items() if key not in ("rope_parameters", "rope_scaling")}
    changed["rope_theta"] = raw.get("rope_theta") or (raw.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    changed["rope_scaling"] = {"type": "yarn", **yarn.model_dump()}
    changed["max_position_embeddings"] = int(yarn.factor * yarn.original_max_position_embeddings)
    return changed
