"""The sections of a recipe."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from experts.transport_kinds import TransportKind
from services.training.part import Amount, Part


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
