"""Medians and spread over repeats, and ratios formed repeat by repeat."""

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict


class Spread(BaseModel):
    """A quantity over the repeats of a run, in the unit that its field's name says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    minimum: float
    first_quartile: float
    third_quartile: float
    maximum: float
    samples: tuple[float, ...]  # one a repeat, in order

    def text(self, digits: int) -> str:
        """The median and, in brackets, the range."""
        return f"{self.median:.{digits}f} ({self.minimum:.{digits}f}-{self.maximum:.{digits}f})"


def spread(samples: Sequence[float]) -> Spread:
    """Median, quartiles and range of `samples`; raises ValueError for none."""
    if not samples:
        raise ValueError("no samples: a spread needs at least one")
    return Spread(
        median=percentile(samples, 50),
        minimum=min(samples),
        first_quartile=percentile(samples, 25),
        third_quartile=percentile(samples, 75),
        maximum=max(samples),
        samples=tuple(samples),
    )


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of 100 of the samples lie, between two of them by straight line."""
    if not samples:
        raise ValueError("no samples: a percentile needs at least one")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent is {percent}; expected 0 to 100")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio(above: Mapping[int, float], below: Mapping[int, float]) -> Spread | None:
    """Spread of above / below, each ratio from one repeat; None when they share no repeat.

    Dividing within a repeat cancels what a machine does slowly; dividing two medians would not.
    """
    shared = sorted(above.keys() & below.keys())
    return spread([above[repeat] / below[repeat] for repeat in shared]) if shared else None
