"""A value over many steps, as so few points as a plot has room for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.training.running_mean import RunningMean

Values = NDArray[np.float64]

POINTS = 1000
SPANS = 50  # a smoothed point is the mean of about this part of the steps before it
LOG_FROM = 10.0  # largest over smallest, from which on a plot is logarithmic


@dataclass(frozen=True, slots=True)
class Curve:
    """At most POINTS points; of the steps that a point stands for, their mean, and the smallest and largest value."""

    steps: Values  # the last of those that the point stands for
    mean: Values
    low: Values
    high: Values
    smoothed: Values


def curve(steps: Values, values: Values) -> Curve:
    """Of at least one step."""
    count = len(values)
    edges = np.linspace(0, count, min(count, POINTS) + 1).astype(np.int64)
    first, last = edges[:-1], edges[1:] - 1
    return Curve(
        steps=steps[last],
        mean=np.add.reduceat(values, first) / np.diff(edges),
        low=np.minimum.reduceat(values, first),
        high=np.maximum.reduceat(values, first),
        smoothed=smooth(values, max(1, count // SPANS))[last],
    )


def smooth(values: Values, span: int) -> Values:
    """RunningMean of the values up to each of them."""
    mean = RunningMean(span)
    return np.array([mean.add(value) for value in values.tolist()], np.float64)


def fits_log(values: Values) -> bool:
    """Whether a logarithmic axis shows more of them."""
    return bool(values.min() > 0 and values.max() >= LOG_FROM * values.min())
