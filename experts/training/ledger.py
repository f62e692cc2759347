"""Which contributions to a step's gradients came, each applied once and in one order, whatever order they came in."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from experts.training.expert import Contribution

Gains = Mapping[int, Contribution]  # by expert
Apply = Callable[[int, Gains], None]  # layer, and what its experts gain


@dataclass(slots=True)
class StepLedger:
    """One step of `micros` micro-batches on `ranks` workers. Within a layer the order is micro-batch, then rank."""

    step: int
    micros: int
    ranks: int
    _next: dict[int, int] = field(default_factory=dict)
    _waiting: dict[int, dict[int, Gains]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step < 0 or self.micros < 1 or self.ranks < 1:
            raise ValueError(f"step {self.step} of {self.micros} micro-batches on {self.ranks} workers is none")

    def turn(self, micro: int, rank: int) -> int:
        """Place in the order; raises ValueError for one that the step does not have."""
        if not 0 <= micro < self.micros or not 0 <= rank < self.ranks:
            raise ValueError(
                f"micro-batch {micro} of worker {rank}; step {self.step} has {self.micros} on {self.ranks} workers"
            )
        return micro * self.ranks + rank

    def add(self, layer: int, turn: int, gains: Gains) -> bool:
        """Take a contribution; False when this turn was there before, and nothing is taken."""
        if turn < self._next.get(layer, 0) or turn in self._waiting.setdefault(layer, {}):
            return False
        self._waiting[layer][turn] = gains
        return True

    def settle(self, apply: Apply) -> None:
        """Apply, and drop, what was taken and is due. After an error of `apply` the step must not be used."""
        for layer, waiting in self._waiting.items():
            while (due := self._next.get(layer, 0)) in waiting:
                self._next[layer] = due + 1
                apply(layer, waiting.pop(due))

    def missing(self, layers: Iterable[int]) -> list[tuple[int, int, int]]:
        """(layer, micro-batch, rank) that did not come yet; the first of each layer. What came is settled before."""
        turns = self.micros * self.ranks
        return [
            (layer, *divmod(self._next.get(layer, 0), self.ranks))
            for layer in sorted(layers)
            if self._next.get(layer, 0) < turns
        ]
