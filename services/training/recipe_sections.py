"""The sections of a recipe."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from experts.tls import TlsFiles
from experts.transport_kinds import TransportKind
from services.training.part import Amount, Part

RESIZE_EVERY_S = 60.0  # a restart with more workers makes the steps since the newest snapshot again


class Data(Part):
    """What is learned from."""

    files: tuple[Path, ...] = Field(
        min_length=1, description="named .jsonl, .json or .txt, or anything where `data.format` is given"
    )
    format: Literal["auto", "messages", "alpaca", "sharegpt", "text"] = Field(
        "auto", description="of the records; `auto`: as each file's first one tells"
    )
    ignore: tuple[str, ...] = Field((), description="a record's keys that are not looked at")
    sequence_length: int = Field(1024, ge=2, description="tokens of a row, into which samples are packed")
    packing: bool = Field(True, description="several samples to a row; without, each has a row of its own")
    overlong: Literal["error", "drop", "truncate", "split"] = Field(
        "error", description="what becomes of samples longer than a row; only `text` can be split"
    )


class Lora(Part):
    """Low-rank factors, for method `lora`."""

    rank: int = Field(16, ge=1, description="inner width of the factors")
    alpha: float = Field(32.0, gt=0, description="their product is added times `alpha` / `rank`")
    targets: tuple[str, ...] = Field(
        ("attention", "shared", "experts"),
        min_length=1,
        description="`attention`, `dense`, `shared` or `experts` for all of them, or names of layers such as q_b_proj",
    )


class Esft(Part):
    """Which experts are trained, for method `esft` (arXiv 2407.01906): in each layer the fewest that reach `share`."""

    by: Literal["gate", "token"] = Field("gate", description="average gate score, or share of tokens that chose it")
    share: float = Field(0.2, gt=0, le=1, description="of a layer's scores or tokens, that the chosen ones add up to")
    samples: int = Field(32, ge=1, description="of the data, to choose by")


class Balance(Part):
    """Coefficients of the balance losses; V2 has 0.003, 0.05 and 0.02, Lite 0.001 for the experts alone."""

    expert: float = Field(0.0, ge=0, description="of the loss that evens the experts' loads")
    device: float = Field(0.0, ge=0, description="the same for devices, which are the routing groups")
    communication: float = Field(0.0, ge=0, description="the same for what devices receive")


class Optimizer(Part):
    """AdamW; `clip` is of the global gradient norm."""

    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradients' running mean")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the running mean of their squares")
    eps: float = Field(1e-8, gt=0, description="added to the root of that mean, by which a step is divided")
    weight_decay: float = Field(0.1, ge=0, description="times the learning rate, of all weights but norms'")
    clip: float | None = Field(1.0, gt=0, description="norm that longer gradients are cut to; null: none are")


class Yarn(Part):
    """Context extension: the trained model's rope_scaling, written to its config.json, too."""

    factor: float = Field(gt=1, le=10_000, description="how many times longer the context becomes")
    original_max_position_embeddings: int = Field(ge=1, lt=2**31, description="tokens of the context before")
    beta_fast: float = Field(32.0, gt=0, description="turns in that context with which a rotary pair keeps its speed")
    beta_slow: float = Field(1.0, gt=0, description="turns with which it is slowed by the whole factor")
    mscale: float = Field(
        0.707, ge=0, description="m in 0.1 m ln(factor) + 1, which rotary cos and sin are multiplied by"
    )
    mscale_all_dim: float = Field(
        0.707, ge=0, description="the same, for what they are divided by and attention scores multiplied by, twice"
    )

    @model_validator(mode="after")
    def _check(self) -> "Yarn":
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast is {self.beta_fast}; expected at least beta_slow ({self.beta_slow})")
        return self


class Tls(Part):
    """PEM files that guard the calls between the run's workers and hosts, as every node sees them."""

    certificate: Path = Field(description="that each worker and host shows, called or calling")
    key: Path = Field(description="the certificate's private key")
    root: Path = Field(description="whoever it signed is let in")
    name: str | None = Field(
        None, description="in every certificate; default: each names the address that its node listens on"
    )

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(self.certificate, self.key, self.root, self.name)


class Experts(Part):
    """Expert hosts of the run: processes of its own, or guests in those of a running service's hosts."""

    service: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Serve application whose expert hosts take them in; `shoal serve --port 8000` is p8000",
    )
    hosts: int = Field(2, ge=1, description="hosts that share the experts")
    replicas: int = Field(1, ge=1, description="hosts that hold each expert; 2: one may die, and no step is lost")
    threads: int | None = Field(None, ge=1, description="of each host; default: its share of its node's cores")
    cpus: float = Field(0.0, ge=0, description="Ray CPUs that each reserves")
    gpus: float = Field(0.0, ge=0, description="Ray GPUs that each reserves, or a part of one; 0: CPUs compute")
    resources: dict[str, Amount] = Field(
        default_factory=dict, description="custom Ray resources that each reserves, on a cluster"
    )
    transport: TransportKind = Field(
        "auto",
        description="of rows to the hosts; `auto`: shared memory on a machine, NIXL between machines, or else gRPC",
    )
    tls: Tls | None = None

    @model_validator(mode="after")
    def _check(self) -> "Experts":
        owners = ("threads", "cpus", "gpus", "resources")
        given = [f"{name}={getattr(self, name)}" for name in owners if getattr(self, name)]
        if self.service is not None and given:
            raise ValueError(
                f"service is {self.service!r} and {', '.join(given)}; expected service alone: its hosts compute with "
                "what that service gave them"
            )
        if self.service is not None and self.tls is not None:
            raise ValueError(
                f"service is {self.service!r} and tls is given; expected service alone: a run in its hosts is guarded "
                "by that service's own files, where it has any"
            )
        return self


class Workers(Part):
    """Data-parallel workers; with `most` above `least` Ray Train starts as many as there is room for."""

    least: int = Field(1, ge=1, description="fewest workers of the run")
    most: int | None = Field(None, ge=1, description="most workers of the run; default: `workers.least`")
    threads: int | None = Field(None, ge=1, description="of each worker; default: its node's cores")
    cpus: float = Field(1.0, ge=0, description="Ray CPUs that each reserves")
    gpus: float = Field(0.0, ge=0, description="Ray GPUs that each reserves; 0: CPUs compute")
    restarts: int = Field(10, ge=0, description="of all workers, after one died")
    resize_every_s: float = Field(
        RESIZE_EVERY_S,
        ge=1,
        description="seconds between looks whether there is room for more workers, up to `most`",
    )

    @model_validator(mode="after")
    def _check(self) -> "Workers":
        if self.resize_every_s != RESIZE_EVERY_S and self.most in (None, self.least):
            raise ValueError(
                f"resize_every_s is {self.resize_every_s} and least and most are {self.least}; expected it left out, "
                "or most above least: the run never has another number of workers"
            )
        return self


class Snapshots(Part):
    """Written beside the training, after every so many steps, and at the end."""

    every_steps: int = Field(100, ge=1, description="from one to the next")
    keep: int = Field(2, ge=1, description="the newest that stay")
    at_end: bool = Field(True, description="of the last step, too; without, an interrupted run keeps one all the same")
