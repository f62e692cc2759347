"""What crosses between an attention worker and an expert host.

Shapes: `R` rows, `P` (row, expert) pairs, `D` model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """Rows of one layer's input, each sent once, and the experts wanted for them."""

    epoch: int
    generation: int
    layer: int
    x_RD: Tensor  # fp32
    pair_row_P: Tensor  # int32
    pair_expert_P: Tensor  # int32

    def __post_init__(self) -> None:
        x, rows, experts = self.x_RD, self.pair_row_P, self.pair_expert_P
        if (
            x.ndim == 2
            and rows.ndim == 1
            and x.dtype is torch.float32
            and rows.dtype is torch.int32
            and experts.dtype is torch.int32
            and rows.shape == experts.shape
        ):
            return  # twice a layer and host: the common case is one expression
        if self.x_RD.ndim != 2 or self.x_RD.dtype != torch.float32:
            raise ValueError(f"x is {tuple(self.x_RD.shape)} {self.x_RD.dtype}; expected [rows, hidden] float32")
        for name, tensor in (("pair_row", self.pair_row_P), ("pair_expert", self.pair_expert_P)):
            if tensor.ndim != 1 or tensor.dtype != torch.int32:
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; expected [pairs] int32")
        if len(self.pair_row_P) != len(self.pair_expert_P):
            raise ValueError(f"{len(self.pair_row_P)} pair rows for {len(self.pair_expert_P)} pair experts")


@dataclass(frozen=True, slots=True)
class ForwardReply:
    """One unweighted expert output a pair, in the order of the request's pairs."""

    generation: int
    y_PD: Tensor  # fp32
