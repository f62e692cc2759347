"""AdamW on the dense side, its state divided over the workers (ZeRO stage 1, arXiv 1910.02054)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attention.training.ranks import Ranks
from experts.training.adamw import AdamW, Trained, squared_norm, step_parameters


def divide(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Which worker steps each parameter: the largest first, each to who has the least so far."""
    loads = [0] * world
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owners[name] = rank
        loads[rank] += sizes[name]
    return owners


class DenseOptimizer:
    """Steps the parameters that are this worker's, and takes the others from theirs."""

    def __init__(self, parameters: Mapping[str, Trained], settings: AdamW, ranks: Ranks) -> None:
        self._parameters = dict(sorted(parameters.items()))
        self._settings = settings
        self._ranks = ranks
        self.owners = divide({name: one.value.numel() for name, one in parameters.items()}, ranks.world)
        self.steps = 0

    def sum_gradients(self) -> float:
        """Gradients of all workers together; their squared norm, the same on every worker."""
        for trained in self._parameters.values():
            if trained.grad is None:
                trained.grad = torch.zeros_like(trained.value)
        self._ranks.sum([trained.grad for trained in self._parameters.values() if trained.grad is not None])
        return squared_norm(list(self._parameters.values()))

    @torch.no_grad()
    def step(self, learning_rate: float, grad_scale: float) -> None:
        """One step; every worker has the same values after it."""
        mine = [self._parameters[name] for name in self._mine()]
        step_parameters(mine, self._settings, learning_rate, grad_scale, self.steps)
        if self._ranks.world > 1:
            for rank in range(self._ranks.world):
                names = [name for name in self._parameters if self.owners[name] == rank]
                self._ranks.broadcast([self._parameters[name].value.detach() for name in names], rank)
        for trained in self._parameters.values():
            trained.grad = None
        self.steps += 1

    def drop_gradients(self) -> None:
        """Forget what an abandoned step left."""
        for trained in self._parameters.values():
            trained.grad = trained.value.grad = None

    def moments(self) -> dict[str, Tensor]:
        """This worker's share of the state: `NAME.mean` and `NAME.square`."""
        state: dict[str, Tensor] = {}
        for name in self._mine():
            state[f"{name}.mean"], state[f"{name}.square"] = self._parameters[name].moments()
        return state

    def wanted(self) -> Sequence[str]:
        """Names of the state that this worker needs to go on."""
        return [f"{name}.{moment}" for name in self._mine() for moment in ("mean", "square")]

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on with this state, which has what is `wanted`."""
        for name in self._mine():
            for tensor, moment in zip(self._parameters[name].moments(), ("mean", "square"), strict=True):
                tensor.copy_(state[f"{name}.{moment}"])
        self.steps = steps

    def reset(self) -> None:
        """Begin again, without moments."""
        for trained in self._parameters.values():
            trained.mean = trained.square = None
        self.steps = 0

    def _mine(self) -> list[str]:
        return [name for name in self._parameters if self.owners[name] == self._ranks.rank]
