"""What a run is a run of, so that a directory's snapshots and results are not taken for another recipe's."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from model.adapters.identity import SECOND, base_identities
from model.checkpoint import Checkpoint
from services.training.data.training_data import TrainingData
from services.training.recipe import Recipe

Json = dict[str, Any]
FREE = (
    *("model", "output_dir", "data.files", "data.ignore", "steps", "epochs", "micro_batch_tokens", "checkpointing"),
    *("export", "experts", "workers", "snapshots"),
)
"""Fields that do not say what comes out, or are told by `Identity.data` and `Identity.model`."""
FIXED = ("method", "lora", "esft", "yarn", "init", "optimizer.beta1", "optimizer.beta2")
"""Fields that no snapshot can be resumed with another value of: what it holds would be of two ways of training."""


@dataclass(frozen=True, slots=True)
class Identity:
    """`data` says what the cursor counts, content and order; `model` is the fingerprint of the first weights.

    `first_model` is the same by the first version of `base_identity`, which earlier runs were kept under.
    """

    recipe: Json
    data: str
    model: str
    first_model: str = ""

    def model_as(self, kept: str) -> str:
        """The model by the version of what was kept, to compare the two."""
        return self.model if f"-{SECOND}" in kept else self.first_model or self.model


def identify(recipe: Recipe, data: TrainingData, checkpoint: Checkpoint) -> Identity:
    """Of a run; a fine-tune of the same shape is another model."""
    shape, (now, first) = checkpoint.fingerprint(), base_identities(checkpoint)
    return Identity(
        recipe.model_dump(mode="json"),
        f"{data.fingerprint()}, seed {recipe.seed}",
        f"{shape}-{now[:18]}",
        f"{shape}-{first[:16]}",
    )


def other_result(before: Json, now: Identity) -> str | None:
    """Why a finished run, whose identity was kept as a dict, made something else; None where it is the same."""
    changed = next(differences(before.get("recipe", {}), now.recipe, FREE), None)
    if changed is None and (model := str(before.get("model", now.model))) != now.model_as(model):
        changed = "it began with another model"
    if changed is None and before.get("data", now.data) != now.data:
        changed = "its data were others, or in another order"
    return changed


def other_training(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why a snapshot of one recipe cannot be resumed with another; None where it can."""
    fixed = tuple(f"{name}{end}" for name in FIXED for end in (" ", "."))
    return next((change for change in differences(before, now, ()) if change.startswith(fixed)), None)


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str], section: str = ""
) -> Iterator[str]:
    """Fields that have another value now, in words; those that were not known then are passed over."""
    for key, value in now.items():
        name, earlier = f"{section}{key}", before.get(key, value)
        if name in free or earlier == value:
            continue
        if isinstance(earlier, Mapping) and isinstance(value, Mapping):
            yield from differences(earlier, value, free, f"{name}.")
        else:
            yield f"{name} was {earlier!r} and is {value!r}"
