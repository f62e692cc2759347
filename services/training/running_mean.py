"""A mean over about the last values of a series."""


class RunningMean:
    """Exponentially weighted: each value counts 1 - 2 / (span + 1) as much as the one after it."""

    def __init__(self, span: int) -> None:
        self._kept = 1 - 2 / (span + 1)
        self._total = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """The mean up to this value; of the first one, itself."""
        self._total = self._kept * self._total + value
        self._weight = self._kept * self._weight + 1
        return self.value

    @property
    def value(self) -> float:
        """0 before the first value."""
        return self._total / self._weight if self._weight else 0.0
