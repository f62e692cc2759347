"""Learning rate and batch size as functions of the step."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from pydantic import Field

from services.training.part import Part

Kind = Literal["steps", "cosine", "constant"]
DECAY = 0.316  # the paper's
DECAYS_AT = (0.6, 0.9)
LOWEST = 0.1


class LearningRate(Part):
    """Linear warm-up, then one of three shapes (section 3.1.2, arXiv 2405.04434, has `steps`)."""

    peak: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Kind = "steps"
    decays_at: tuple[float, ...] = Field(DECAYS_AT, description="shares of all steps; for `steps`")
    decay: float = Field(DECAY, gt=0, le=1)
    lowest: float = Field(LOWEST, ge=0, le=1, description="share of the peak at the end; for `cosine`")

    def at(self, step: int, steps: int) -> float:
        """Of the step after `step` steps, of `steps` in all."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule == "steps":
            # shares as they are written: 0.55 of 100 steps are 55, and not one more for the float's last bit
            begun = sum(step >= Fraction(str(share)) * steps for share in self.decays_at)
            return self.peak * self.decay**begun
        if self.schedule == "cosine":
            done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
            return self.peak * (self.lowest + (1 - self.lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        return self.peak


class BatchStage(Part):
    """From a step on, so many tokens a step."""

    from_step: int = Field(ge=0)
    tokens: int = Field(ge=1)


def batch_tokens(stages: Sequence[BatchStage], step: int) -> int:
    """Tokens of the step after `step` steps; the first stage begins at 0 and the others rise."""
    return [stage.tokens for stage in stages if stage.from_step <= step][-1]


def check_decays(shares: Sequence[float]) -> None:
    """Raises ValueError for shares of a run at which its learning rate cannot decay one after another."""
    if list(shares) != sorted(set(shares)) or not all(0 < share < 1 for share in shares):
        raise ValueError(f"lr_decays_at is {list(shares)}; expected rising shares of the steps, between 0 and 1")


def check_schedule(steps: int, warmup_steps: int, stages: Sequence[BatchStage]) -> None:
    """Raises ValueError for a warm-up that no step follows, and for a stage that no step has."""
    if warmup_steps >= steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} and the run has {steps} steps; expected less: the learning rate would "
            "never arrive"
        )
    late = [stage.from_step for stage in stages if stage.from_step >= steps]
    if late:
        raise ValueError(
            f"batch_stages has one from step {late[0]} on and the run has {steps} steps; expected it before the end"
        )
