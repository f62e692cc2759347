"""A fine-tuning recipe: everything that a run is, in one checked document."""

import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from experts.training.spec import ParameterDtype
from services.training.part import Part
from services.training.recipe_sections import Balance, Data, Esft, Experts, Lora, Optimizer, Snapshots, Workers, Yarn
from services.training.schedule import (
    DECAY,
    DECAYS_AT,
    LOWEST,
    BatchStage,
    Kind,
    LearningRate,
    check_decays,
    check_schedule,
)

OF_LISTS = {
    "tuple_type": "expected a list, such as [a, b]",
    "too_short": "the list is empty; expected one entry at least",
}
"""What is wrong with a list, by pydantic's name for it."""


class RecipeError(ValueError):
    """A recipe that cannot be used; names the field, what was given and what was expected."""


class Recipe(Part):
    """One run."""

    model: Path = Field(description="directory of a checkpoint; with `init: random`, of a config.json and a tokenizer")
    output_dir: Path = Field(description="directory of everything that the run writes, and goes on from")
    init: Literal["checkpoint", "random"] = Field("checkpoint", description="what training begins with")
    init_std: float = Field(0.006, gt=0, description="standard deviation of random weights; for `init: random`")
    data: Data
    method: Literal["full", "lora", "esft"] = Field(
        "full", description="train everything, low-rank factors, or the experts that the data go to"
    )
    lora: Lora = Lora()
    esft: Esft = Esft()
    steps: int | None = Field(None, ge=1, description="length of the run; one of `steps` and `epochs` is required")
    epochs: float | None = Field(
        None,
        gt=0,
        le=10_000,
        description="how often each sample is seen, instead: the last batch ends with them, and none lies in two",
    )
    batch_tokens: int = Field(4096, ge=2, description="of a step, over all workers")
    batch_stages: tuple[BatchStage, ...] = Field(
        (), description="instead of `batch_tokens`, where it grows: `{from_step: 0, tokens: 512}` and later ones"
    )
    micro_batch_tokens: int = Field(2048, ge=2, description="of one forward and backward on one worker")
    lr: float = Field(1e-5, gt=0, description="learning rate, at its highest")
    warmup_steps: int = Field(0, ge=0, description="in which it rises to `lr`; less than all steps")
    schedule: Kind = Field("steps", description="shape of the learning rate after the warm-up")
    lr_decays_at: tuple[float, ...] = Field(DECAYS_AT, description="shares of all steps; for `steps`")
    lr_decay: float = Field(DECAY, gt=0, le=1, description="what `lr` is multiplied by at each; for `steps`")
    lr_lowest: float = Field(LOWEST, ge=0, le=1, description="share of `lr` at the end; for `cosine`")
    optimizer: Optimizer = Optimizer()
    dtype: ParameterDtype = Field(
        "float32", description="of the weights that it computes with; what is stepped is fp32"
    )
    balance: Balance = Balance()
    drop_tokens: bool = Field(False, description="drop slots over a device's average load")
    checkpointing: bool = Field(False, description="compute activations again in backward, to save memory")
    yarn: Yarn | None = None
    seed: int = Field(0, ge=0, lt=2**63, description="of the samples' order, and of every random weight and factor")
    experts: Experts = Experts()
    workers: Workers = Workers()
    snapshots: Snapshots = Snapshots()
    export: bool = Field(True, description="write the result in Hugging Face's layout at the end")

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps is {self.steps} and epochs {self.epochs}; expected exactly one of them")
        if self.experts.replicas > self.experts.hosts:
            raise ValueError(f"experts.replicas is {self.experts.replicas}; expected at most experts.hosts")
        if self.workers.most is not None and self.workers.most < self.workers.least:
            raise ValueError(f"workers.most is {self.workers.most}; expected at least workers.least")
        if self.init == "random" and self.method != "full":
            raise ValueError(f"init is random and method {self.method}; expected method full: nothing is known yet")
        if self.yarn is not None and self.method != "full":
            raise ValueError(
                f"yarn is given and method is {self.method}; expected method full: an adapter or a delta has no "
                "config.json to tell of it, and would be served beside the context that the model had before"
            )
        check_decays(self.lr_decays_at)
        self._check_batches()
        self._check_unused()
        return self

    def _check_batches(self) -> None:
        starts = [stage.from_step for stage in self.batch_stages]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(f"batch_stages begin at steps {starts}; expected 0 first, then rising ones")
        smallest, length = min(stage.tokens for stage in self.stages), self.data.sequence_length
        if smallest < length:
            raise ValueError(f"a step has {smallest} tokens; expected at least data.sequence_length ({length})")
        if self.micro_batch_tokens < length:
            raise ValueError(
                f"micro_batch_tokens is {self.micro_batch_tokens}; expected at least data.sequence_length ({length}): "
                "a row is not divided"
            )
        if self.steps is not None:
            check_schedule(self.steps, self.warmup_steps, self.stages)

    def _check_unused(self) -> None:
        """What would change nothing is refused, unless it is the default, as in a recipe that `--dry-run` wrote out."""
        shape = f"schedule is {self.schedule}"
        unused = {
            "lora": "" if self.method == "lora" else f"method is {self.method}, which has no factors",
            "esft": "" if self.method == "esft" else f"method is {self.method}, which chooses no experts",
            "init_std": "" if self.init == "random" else f"init is {self.init}, which draws no weights",
            **dict.fromkeys(("lr_decays_at", "lr_decay"), "" if self.schedule == "steps" else f"{shape}, of no decays"),
            "lr_lowest": "" if self.schedule == "cosine" else f"{shape}, which approaches nothing",
            "batch_tokens": "batch_stages say how many tokens a step has" if self.batch_stages else "",
        }
        for name, why in unused.items():
            given, default = getattr(self, name), type(self).model_fields[name].default
            if why and given != default:
                raise ValueError(f"{_changed(name, given, default)}; expected it left out: {why}")

    @property
    def stages(self) -> tuple[BatchStage, ...]:
        return self.batch_stages or (BatchStage(from_step=0, tokens=self.batch_tokens),)

    @property
    def learning_rate(self) -> LearningRate:
        return LearningRate(
            peak=self.lr,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            decays_at=self.lr_decays_at,
            decay=self.lr_decay,
            lowest=self.lr_lowest,
        )


def parse_recipe(raw: dict[str, Any]) -> Recipe:
    """Raises RecipeError naming the first thing that is wrong."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{place} is not a field of a recipe; {_known(first['loc'])}") from error
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r:.80})"
        message = OF_LISTS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{place + ': ' if place else ''}{message}{given}") from error


def _changed(name: str, given: Any, default: Any) -> str:
    """`name is value`, or of a section the first such field."""
    if not isinstance(given, Part):
        return f"{name} is {given}"
    field = next(field for field in type(given).model_fields if getattr(given, field) != getattr(default, field))
    return f"{name}.{field} is {getattr(given, field)}"


def _known(place: tuple[int | str, ...]) -> str:
    *sections, last = place
    section, dot, rest = str(last).partition(".")
    if dot:
        return f"only the command line has dots into sections: write {section}: {{{rest}: ...}}"
    part: Any = Recipe
    for name in sections:
        part = part if isinstance(name, int) else _part(part.model_fields[name].annotation)
    return f"expected one of {', '.join(sorted(part.model_fields))}"


def _part(annotation: Any) -> Any:
    """The section of `Section`, `Section | None` and `tuple[Section, ...]`."""
    inner = typing.get_args(annotation)
    return inner[0] if inner else annotation
