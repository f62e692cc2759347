"""The first weights of a run that begins at random."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import parse_config, read_raw_config
from model.export import export_checkpoint
from model.tensors import expected_tensors
from services.training.recipe import Recipe


def initial_checkpoint(recipe: Recipe) -> Checkpoint:
    """Normal with the recipe's deviation, norms 1, a function of the seed; written once, below the output directory.

    Raises ValueError (ConfigError, CheckpointError) when the model's config.json cannot be used.
    """
    out: Path = recipe.output_dir / "initial"
    if not out.exists():
        raw = dict(read_raw_config(recipe.model))
        export_checkpoint(out, raw, _weights(recipe, raw), recipe.model)
    return Checkpoint.open(out)


def _weights(recipe: Recipe, raw: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, shape in expected_tensors(parse_config(raw)).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
        else:
            yield name, torch.empty(shape).normal_(std=recipe.init_std, generator=generator)
