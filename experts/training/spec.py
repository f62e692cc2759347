"""What every host of a training run is told once."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from experts.training.adamw import AdamW
from router.holding import Pair

ParameterDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA on the routed experts: gate and up share one A, as the fused parameter of transformers has it."""

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; expected at least 1")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}; expected above 0")

    @property
    def scale(self) -> float:
        """What B·A is multiplied by, alpha / rank as PEFT has it."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class ExpertTraining:
    """How experts are trained. Raises ValueError naming the field that is out of range."""

    run_id: str
    seed: int = 0  # of LoRA's first A
    dtype: ParameterDtype = "float32"  # that experts compute with; what is stepped is always fp32
    adamw: AdamW = field(default_factory=AdamW)
    only: tuple[Pair, ...] | None = None  # (layer, expert) pairs that are trained; None: all
    lora: LowRank | None = None  # None: the matrices themselves are trained
    keeps: bool = True  # what forward computed is kept for backward, instead of computed again

    def __post_init__(self) -> None:
        if not self.run_id:
            raise ValueError("run_id is empty; expected a name for this run")
        if self.dtype not in get_args(ParameterDtype):
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(get_args(ParameterDtype))}")

    def trains(self, pair: Pair) -> bool:
        return self.only is None or pair in self.only

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ExpertTraining":
        """Inverse of to_json; raises ValueError, KeyError or TypeError on anything else."""
        raw = json.loads(text)
        lora, only, adamw = raw.pop("lora"), raw.pop("only"), raw.pop("adamw")
        return cls(
            **raw,
            adamw=AdamW(**adamw),
            lora=LowRank(**lora) if lora is not None else None,
            only=as_pairs(only) if only is not None else None,
        )


def as_pairs(raw: Iterable[Iterable[int]]) -> tuple[Pair, ...]:
    """(layer, expert) pairs as JSON has them; raises ValueError or TypeError on anything else."""
    pairs: list[Pair] = []
    for layer, expert in raw:
        if type(layer) is not int or type(expert) is not int:
            raise TypeError(f"({layer!r}, {expert!r}) is no (layer, expert) pair")
        pairs.append((layer, expert))
    return tuple(pairs)
