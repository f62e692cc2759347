"""The dense side's tensors while they are trained, under their checkpoint names.

What is stepped is kept in fp32. Where the run computes in bf16, each use is rounded to it, and the gradient reaches the
fp32 tensor as if it were not.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attention.training.linear import linear
from experts.training.adamw import Trained
from experts.training.spec import ParameterDtype
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.tensors import Shape, expected_tensors


def dense_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name to shape of everything but the routed experts."""
    return {name: shape for name, shape in expected_tensors(config).items() if ".mlp.experts." not in name}


class _Round(torch.autograd.Function):
    """fp32 to the nearest bf16 and back; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout


def _round(x: Tensor) -> Tensor:
    out: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return out


class DenseParameters:
    """Tensors by name, and which of them are trained."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        trained: Callable[[str], bool],
        factors: Mapping[str, Tensor] | None = None,
        scale: float = 0.0,
        dtype: ParameterDtype = "float32",
    ) -> None:
        """`factors` are LoRA's A and B, named after their module, multiplied by `scale`; they are always trained.

        `tensors` are fp32, and owned from now on.
        """
        self._tensors = dict(tensors)
        self._factors = dict(factors or {})
        self._scale = scale
        self._rounds = dtype == "bfloat16"
        self.trained: dict[str, Trained] = {}
        for name, tensor in self._tensors.items():
            if trained(name):
                self.trained[name] = Trained(tensor.requires_grad_(), decays=tensor.ndim > 1)
        for name, tensor in self._factors.items():
            self.trained[name] = Trained(tensor.requires_grad_())

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        trained: Callable[[str], bool],
        factors: Mapping[str, Tensor] | None = None,
        scale: float = 0.0,
        dtype: ParameterDtype = "float32",
        device: str = "cpu",
    ) -> "DenseParameters":
        """Read the dense side of a checkpoint."""
        names = list(dense_tensors(checkpoint.config))
        read = zip(names, checkpoint.tensors(names), strict=True)
        return cls({name: tensor.float().to(device) for name, tensor in read}, trained, factors, scale, dtype)

    def __getitem__(self, name: str) -> Tensor:
        """What is computed with; raises KeyError for an unknown name."""
        tensor = self._tensors[name]
        if not self._rounds:
            return tensor
        if tensor.device.type != "cpu":
            return tensor.bfloat16()
        return _round(tensor)

    def linear(self, module: str, x: Tensor) -> Tensor:
        """x times a module's weight, transposed, and its low-rank product where there is one."""
        out = linear(x, self[f"{module}.weight"])
        factor_a = self._factors.get(f"{module}.lora_A")
        if factor_a is not None:
            factor_b = self._factors[f"{module}.lora_B"]
            out = out + self._scale * linear(linear(x, factor_a.to(x.dtype)), factor_b.to(x.dtype))
        return out

    @torch.no_grad()
    def restore(self, read: Callable[[str], Tensor]) -> None:
        """Set every trained tensor anew."""
        for name, trained in self.trained.items():
            trained.value.copy_(read(name))
            trained.grad = trained.value.grad = None

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint as it stands, low-rank factors aside."""
        return iter(self._tensors.items())

    def take_gradients(self) -> None:
        """Move what autograd left to where the optimizer looks for it."""
        for trained in self.trained.values():
            trained.grad, trained.value.grad = trained.value.grad, None
