"""The first weights of a run that begins at random."""

import json
import shutil
from collections.abc import Iterator

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import parse_config, read_raw_config
from model.export import export_checkpoint
from model.snapshots.history import snapshots
from model.tensors import expected_tensors
from services.training.outcome import SNAPSHOTS, read_kept, write_whole
from services.training.recipe import Recipe

INITIAL = "initial"
DRAWN_OF = "initial.json"


def initial_checkpoint(recipe: Recipe) -> Checkpoint:
    """Normal with the recipe's deviation, norms 1, a function of the seed; written once, below the output directory.

    Those of another config.json, seed or deviation are drawn anew, unless there are snapshots of what they became.
    Raises ValueError (ConfigError, CheckpointError) then, and when the model's config.json cannot be used.
    """
    out, drawn_of = recipe.output_dir / INITIAL, recipe.output_dir / DRAWN_OF
    raw = dict(read_raw_config(recipe.model))
    wanted = {"config": raw, "seed": recipe.seed, "init_std": recipe.init_std}
    if out.exists() and read_kept(drawn_of) != wanted:
        trained = recipe.output_dir / SNAPSHOTS
        if snapshots(trained):
            raise ValueError(
                f"{out} was drawn for another config.json, seed or init_std, and {trained} has what was trained from "
                "it; give the same, or another output_dir"
            )
        shutil.rmtree(out)
    if not out.exists():
        export_checkpoint(out, raw, _weights(recipe, raw), recipe.model)
        write_whole(drawn_of, json.dumps(wanted))
    return Checkpoint.open(out)


def _weights(recipe: Recipe, raw: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, shape in expected_tensors(parse_config(raw)).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
        else:
            yield name, torch.empty(shape).normal_(std=recipe.init_std, generator=generator)
