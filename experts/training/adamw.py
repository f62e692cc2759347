"""AdamW by torch's own kernel (Loshchilov and Hutter, arXiv 1711.05101), on parameters that lie anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(frozen=True, slots=True)
class AdamW:
    """What does not change during a run. Raises ValueError naming the field that is out of range."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to below 1")
        if self.eps <= 0:
            raise ValueError(f"eps is {self.eps}; expected above 0")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; expected at least 0")


@dataclass(slots=True)
class Trained:
    """One parameter that is stepped, fp32, and what the optimizer remembers of it."""

    value: Tensor
    decays: bool = True
    grad: Tensor | None = None  # since the last step; None: nothing yet
    mean: Tensor | None = field(default=None, repr=False)
    square: Tensor | None = field(default=None, repr=False)
    buffer: Tensor | None = field(default=None, repr=False)  # of gradients, kept: new memory costs as much as the sum

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left.T @ right to the gradient."""
        if self.grad is None:
            if self.buffer is None:
                self.buffer = torch.empty_like(self.value)
            self.grad = torch.mm(left.T, right, out=self.buffer)
        else:
            self.grad.addmm_(left.T, right)

    def moments(self) -> tuple[Tensor, Tensor]:
        """First and second, made as zeros when they are first wanted."""
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)
        return self.mean, self.square


def squared_norm(parameters: Sequence[Trained]) -> float:
    """Of all their gradients together, each norm taken in fp32 and added in fp64."""
    grads = [trained.grad for trained in parameters if trained.grad is not None]
    return sum(float(torch.linalg.vector_norm(grad)) ** 2 for grad in grads)


def step_parameters(
    parameters: Sequence[Trained], settings: AdamW, learning_rate: float, grad_scale: float, steps_before: int
) -> None:
    """One step in place; a parameter without a gradient has a gradient of zero, and decays all the same.

    Gradients are multiplied by `grad_scale`, above 0, first, which is what clipping amounts to; they are used up.
    """
    divisor = torch.tensor(1.0 / grad_scale)  # as torch's kernel takes it, in the same pass as everything else
    for decays in (True, False):
        group = [trained for trained in parameters if trained.decays is decays]
        if not group:
            continue
        values: list[Tensor] = []
        grads: list[Tensor] = []
        means: list[Tensor] = []
        squares: list[Tensor] = []
        for trained in group:
            mean, square = trained.moments()
            grad = trained.grad if trained.grad is not None else torch.zeros_like(trained.value)
            values.append(trained.value)
            grads.append(grad)
            means.append(mean)
            squares.append(square)
        adamw(
            values,
            grads,
            means,
            squares,
            [],
            [torch.tensor(float(steps_before), device=value.device) for value in values],
            fused=True,
            amsgrad=False,
            beta1=settings.beta1,
            beta2=settings.beta2,
            lr=learning_rate,
            weight_decay=settings.weight_decay if decays else 0.0,
            eps=settings.eps,
            maximize=False,
            grad_scale=divisor if grad_scale != 1.0 else None,
        )
