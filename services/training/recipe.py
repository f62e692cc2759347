"""A fine-tuning recipe: everything that a run is, in one checked document."""

import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from experts.training.spec import ParameterDtype
from experts.transport_kinds import TransportKind
from services.training.part import Amount, Part
from services.training.schedule import BatchStage, LearningRate, check_schedule


class RecipeError(ValueError):
    """A recipe that cannot be used; names the field, what was given and what was expected."""


class Data(Part):
    """What is learned from."""

    files: tuple[Path, ...] = Field(min_length=1)
    format: Literal["auto", "messages", "alpaca", "sharegpt", "text"] = "auto"
    ignore: tuple[str, ...] = Field((), description="a record's keys that are not looked at")
    sequence_length: int = Field(1024, ge=2, description="tokens of a row, into which samples are packed")
    packing: bool = True
    overlong: Literal["error", "drop", "truncate", "split"] = "error"


class Lora(Part):
    """Low-rank factors, for method `lora`."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: tuple[str, ...] = Field(
        ("attention", "shared", "experts"),
        min_length=1,
        description="`attention`, `dense`, `shared` or `experts` for all of them, or names of layers such as q_b_proj",
    )


class Esft(Part):
    """Which experts are trained, for method `esft` (arXiv 2407.01906): in each layer the fewest that reach `share`."""

    by: Literal["gate", "token"] = Field("gate", description="average gate score, or share of tokens that chose it")
    share: float = Field(0.2, gt=0, le=1)
    samples: int = Field(32, ge=1, description="of the data, to look at")


class Balance(Part):
    """Coefficients of the balance losses; V2 has 0.003, 0.05 and 0.02, Lite 0.001 for the experts alone."""

    expert: float = Field(0.0, ge=0)
    device: float = Field(0.0, ge=0)
    communication: float = Field(0.0, ge=0)


class Optimizer(Part):
    """AdamW; `clip` is of the global gradient norm."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float | None = Field(1.0, gt=0)


class Yarn(Part):
    """Context extension: the trained model's rope_scaling, written to its config.json, too."""

    factor: float = Field(gt=1, le=10_000)
    original_max_position_embeddings: int = Field(ge=1, lt=2**31)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float = Field(0.707, ge=0)
    mscale_all_dim: float = Field(0.707, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "Yarn":
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast is {self.beta_fast}; expected at least beta_slow ({self.beta_slow})")
        return self


class Experts(Part):
    """Expert hosts of the run: processes of its own, or guests in those of a running service's hosts."""

    service: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Serve application whose expert hosts take them in; `shoal serve --port 8000` is p8000",
    )
    hosts: int = Field(2, ge=1)
    replicas: int = Field(1, ge=1, description="hosts that hold each expert; 2: one may die, and no step is lost")
    threads: int | None = Field(None, ge=1)
    cpus: float = Field(0.0, ge=0, description="Ray CPUs that each reserves")
    gpus: float = Field(0.0, ge=0)
    resources: dict[str, Amount] = Field(default_factory=dict)
    transport: TransportKind = "auto"

    @model_validator(mode="after")
    def _check(self) -> "Experts":
        owners = ("threads", "cpus", "gpus", "resources")
        given = [f"{name}={getattr(self, name)}" for name in owners if getattr(self, name)]
        if self.service is not None and given:
            raise ValueError(
                f"service is {self.service!r} and {', '.join(given)}; expected service alone: its hosts compute with "
                "what that service gave them"
            )
        return self


class Workers(Part):
    """Data-parallel workers; with `most` above `least` Ray Train starts as many as there is room for."""

    least: int = Field(1, ge=1)
    most: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    restarts: int = Field(10, ge=0, description="of all workers, after one died")


class Snapshots(Part):
    """Written beside the training, after every so many steps, and at the end."""

    every_steps: int = Field(100, ge=1)
    keep: int = Field(2, ge=1)
    at_end: bool = Field(True, description="of the last step, too; without, an interrupted run keeps one all the same")


class Recipe(Part):
    """One run."""

    model: Path = Field(description="directory of a checkpoint; with `init: random`, of a config.json and a tokenizer")
    output_dir: Path
    init: Literal["checkpoint", "random"] = "checkpoint"
    init_std: float = Field(0.006, gt=0)
    data: Data
    method: Literal["full", "lora", "esft"] = "full"
    lora: Lora = Lora()
    esft: Esft = Esft()
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(
        None, gt=0, le=10_000, description="the last batch ends with them, and none lies in two"
    )
    batch_tokens: int = Field(4096, ge=2, description="of a step, over all workers")
    batch_stages: tuple[BatchStage, ...] = Field((), description="instead of batch_tokens, where it grows")
    micro_batch_tokens: int = Field(2048, ge=2, description="of one forward and backward on one worker")
    lr: float = Field(1e-5, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    optimizer: Optimizer = Optimizer()
    dtype: ParameterDtype = "float32"
    balance: Balance = Balance()
    drop_tokens: bool = Field(False, description="slots over a device's average load")
    checkpointing: bool = Field(False, description="compute activations again in backward, to save memory")
    yarn: Yarn | None = None
    seed: int = Field(0, ge=0, lt=2**63)
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
        unused = {
            "lora": "" if self.method == "lora" else f"method is {self.method}, which has no factors",
            "esft": "" if self.method == "esft" else f"method is {self.method}, which chooses no experts",
            "init_std": "" if self.init == "random" else f"init is {self.init}, which draws no weights",
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
        return LearningRate(peak=self.lr, warmup_steps=self.warmup_steps, schedule=self.schedule)


def parse_recipe(raw: dict[str, Any]) -> Recipe:
    """Raises RecipeError naming the first thing that is wrong."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{place} is not a field of a recipe; {_known(place)}") from error
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r:.80})"
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{place + ': ' if place else ''}{message}{given}") from error


def _changed(name: str, given: Any, default: Any) -> str:
    """`name is value`, or of a section the first such field."""
    if not isinstance(given, Part):
        return f"{name} is {given}"
    field = next(field for field in type(given).model_fields if getattr(given, field) != getattr(default, field))
    return f"{name}.{field} is {getattr(given, field)}"


def _known(place: str) -> str:
    part: Any = Recipe
    for name in place.split(".")[:-1]:
        part = part if name.isdigit() else _part(part.model_fields[name].annotation)
    return f"expected one of {', '.join(sorted(part.model_fields))}"


def _part(annotation: Any) -> Any:
    """The section of `Section`, `Section | None` and `tuple[Section, ...]`."""
    inner = typing.get_args(annotation)
    return inner[0] if inner else annotation
