"""How many rows go to each expert, gathered and aged."""

from collections.abc import Mapping, Sequence


class LoadBook:
    """Loads of experts, of which half is forgotten every `half_life_s` seconds. The time is always an argument."""

    def __init__(self, layers: Sequence[int], experts: int, half_life_s: float = 60.0) -> None:
        if not half_life_s > 0:
            raise ValueError(f"half_life_s is {half_life_s}; expected more than 0")
        self._experts = experts
        self._half_life_s = half_life_s
        self._loads = {layer: [0.0] * experts for layer in layers}
        self._at_s = float("-inf")

    def add(self, counts: Mapping[int, Sequence[float]], now_s: float) -> None:
        """Add what a `LoadMeter` counted, at `now_s` seconds of a clock that never goes back.

        Raises ValueError, and adds nothing, for a layer that is not in the book or other numbers of experts.
        """
        for layer, rows in counts.items():
            if layer not in self._loads:
                raise ValueError(f"counts of layer {layer}; the book has layers {sorted(self._loads)}")
            if len(rows) != self._experts:
                raise ValueError(f"layer {layer} has counts of {len(rows)} experts; expected {self._experts}")
        kept = self._kept(now_s)
        for layer, loads in self._loads.items():
            rows = counts.get(layer, (0,) * self._experts)
            self._loads[layer] = [load * kept + new for load, new in zip(loads, rows, strict=True)]
        self._at_s = max(self._at_s, now_s)

    def loads(self, now_s: float) -> dict[int, tuple[float, ...]]:
        """Rows of each expert, by layer, aged to `now_s`; all zero until something came."""
        kept = self._kept(now_s)
        return {layer: tuple(load * kept for load in loads) for layer, loads in self._loads.items()}

    def total(self, now_s: float) -> float:
        """Rows of all experts and layers, aged to `now_s`."""
        return sum(map(sum, self.loads(now_s).values()))

    def _kept(self, now_s: float) -> float:
        """The share of what is in the book that is still there; all of it where the clock seems to go back."""
        return float(0.5 ** (max(0.0, now_s - self._at_s) / self._half_life_s))
