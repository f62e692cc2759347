"""What crosses between a training worker and an expert host, beside forward requests.

Shapes: `R` rows, `P` (row, expert) pairs, `A` pairs that are answered, `D` model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BackwardRequest:
    """Rows of one layer's input and of its output's gradient, for every expert that a host holds of those chosen.

    Every holder of an expert is sent all of its rows, so that each can step alone and stays equal to the others; dx and
    dweight are wanted from one of them.
    """

    generation: int
    step: int
    micro: int  # micro-batch of the step
    rank: int  # worker
    layer: int
    x_RD: Tensor  # fp32
    dout_RD: Tensor  # fp32
    pair_row_P: Tensor  # int32
    pair_expert_P: Tensor  # int32
    pair_weight_P: Tensor  # fp32
    answer_P: Tensor  # int32, 1 where dx and dweight are wanted

    def __post_init__(self) -> None:
        if self.x_RD.ndim != 2 or self.dout_RD.shape != self.x_RD.shape:
            shapes = tuple(self.x_RD.shape), tuple(self.dout_RD.shape)
            raise ValueError(f"x and dout are {shapes}; expected [rows, hidden] twice")
        pairs = self.pair_row_P.shape
        columns = (self.pair_row_P, self.pair_expert_P, self.answer_P)
        if len(pairs) != 1 or any(one.shape != pairs or one.dtype != torch.int32 for one in columns):
            raise ValueError("pair_row, pair_expert and answer: expected [pairs] int32, equally long")
        if self.pair_weight_P.shape != pairs:
            raise ValueError(f"pair_weight is {tuple(self.pair_weight_P.shape)}; expected {tuple(pairs)}")
        for name, tensor in (("x", self.x_RD), ("dout", self.dout_RD), ("pair_weight", self.pair_weight_P)):
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype}; expected float32")


@dataclass(frozen=True, slots=True)
class BackwardReply:
    """Gradients of the answered pairs, in their order."""

    generation: int
    dx_AD: Tensor  # fp32, of the weighted output
    dweight_A: Tensor  # fp32
