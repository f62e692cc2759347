"""A fine-tuning recipe: everything that a run is, in one checked document."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experts.training.spec import ParameterDtype
from experts.transport_kinds import TransportKind
from services.training.schedule import BatchStage, LearningRate


class RecipeError(ValueError):
    """A recipe that cannot be used; names the field, what was given and what was expected."""


class Part(BaseModel):
    """A section: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Part):
    """What is learned from."""

    files: tuple[Path, ...] = Field(min_length=1)
    format: Literal["auto", "messages", "alpaca", "sharegpt", "text"] = "auto"
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

    expert: float = Field(0.0, ge=0, allow_inf_nan=False)
    device: float = Field(0.0, ge=0, allow_inf_nan=False)
    communication: float = Field(0.0, ge=0, allow_inf_nan=False)


class Optimizer(Part):
    """AdamW; `clip` is of the global gradient norm."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float | None = Field(1.0, gt=0)


class Yarn(Part):
    """Context extension: the trained model's rope_scaling, written to its config.json, too."""

    factor: float = Field(gt=1)
    original_max_position_embeddings: int = Field(ge=1)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.707
    mscale_all_dim: float = 0.707


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
    resources: dict[str, float] = {}
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
    epochs: float | None = Field(None, gt=0)
    batch_tokens: int = Field(4096, ge=2, description="of a step, over all workers")
    batch_stages: tuple[BatchStage, ...] = Field((), description="instead of batch_tokens, where it grows")
    micro_batch_tokens: int = Field(2048, ge=2, description="of one forward and backward on one worker")
    lr: float = Field(1e-5, gt=0, allow_inf_nan=False)
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
        starts = [stage.from_step for stage in self.batch_stages]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(f"batch_stages begin at steps {starts}; expected 0 first, then rising ones")
        if self.init == "random" and self.method != "full":
            raise ValueError(f"init is random and method {self.method}; expected method full: nothing is known yet")
        smallest = min((stage.tokens for stage in self.stages), default=0)
        if smallest < self.data.sequence_length:
            raise ValueError(
                f"a step has {smallest} tokens; expected at least data.sequence_length ({self.data.sequence_length})"
            )
        if self.micro_batch_tokens < self.data.sequence_length:
            raise ValueError(
                f"micro_batch_tokens is {self.micro_batch_tokens}; expected at least data.sequence_length "
                f"({self.data.sequence_length}): a row is not divided"
            )
        return self

    @property
    def stages(self) -> tuple[BatchStage, ...]:
        return self.batch_stages or (BatchStage(from_step=0, tokens=self.batch_tokens),)

    @property
    def learning_rate(self) -> LearningRate:
        return LearningRate(peak=self.lr, warmup_steps=self.warmup_steps, schedule=self.schedule)


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a YAML file, then `key=value` for each of the overrides, with dots into sections.

    Paths in the file are relative to the working directory. Raises RecipeError naming the first thing that is wrong.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist: give a recipe, such as examples/sft.yaml") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds a {type(raw).__name__}; expected keys and values")
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw)


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


def _override(raw: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise RecipeError(f"{text!r} is no override; expected key=value, such as lr=1e-5 or experts.hosts=4")
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise RecipeError(f"{key}: {section} is not a section")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: {value!r} cannot be read as YAML: {error}") from error
    target[last] = _number(parsed)


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-5 for text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _known(place: str) -> str:
    model: Any = Recipe
    for section in place.split(".")[:-1]:
        model = model.model_fields[section].annotation
    return f"expected one of {', '.join(sorted(model.model_fields))}"
