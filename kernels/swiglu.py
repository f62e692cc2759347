"""SwiGLU feed-forward networks: one, and the many of an expert layer.

Shapes: `R` rows, `P` (row, expert) pairs, `D` model, `I` intermediate.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.linear import PackedLinear


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) times second half, [..., 2I] -> [..., I].

    On CPU the sigmoid is taken in float64: torch's vector and scalar exponentials differ in the last bit of
    float32, and which of them an element meets depends on where it lies in the tensor.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.device.type != "cpu":
        return F.silu(gate) * up
    return gate * torch.sigmoid(gate.double()).to(gate.dtype) * up


class PackedExperts:
    """Some of one layer's experts, each loaded and unloaded by number."""

    def __init__(self, hidden_size: int, intermediate_size: int, device: str = "cpu") -> None:
        self._hidden = hidden_size
        self._intermediate = intermediate_size
        self._device = device
        self._experts: dict[int, tuple[PackedLinear, PackedLinear]] = {}

    @property
    def experts(self) -> tuple[int, ...]:
        return tuple(sorted(self._experts))

    @property
    def nbytes(self) -> int:
        return sum(gate_up.nbytes + down.nbytes for gate_up, down in self._experts.values())

    def load(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Take an expert's weights: gate and up [I, D], down [D, I]; raises ValueError on other shapes."""
        wide, tall = (self._intermediate, self._hidden), (self._hidden, self._intermediate)
        shapes = tuple(gate.shape), tuple(up.shape), tuple(down.shape)
        if shapes != (wide, wide, tall):
            raise ValueError(f"expert {expert} has shapes {shapes}; expected {(wide, wide, tall)}")
        gate_up = PackedLinear(torch.cat((gate, up)).to(self._device))
        self._experts[expert] = (gate_up, PackedLinear(down.to(self._device)))

    def unload(self, expert: int) -> None:
        """Drop an expert; raises KeyError when it is not loaded."""
        del self._experts[expert]

    def unpack(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down of a loaded expert."""
        gate_up, down = self._experts[expert]
        gate, up = gate_up.unpack().chunk(2)
        return gate, up, down.unpack()

    def __call__(self, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor) -> Tensor:
        """FFN of pair_expert[p] on x[pair_row[p]], unweighted, in the order of the pairs: [P, D] fp32.

        Raises KeyError for an expert that is not loaded and IndexError for a row that does not exist.
        """
        out_PD = torch.empty(len(pair_row_P), self._hidden, dtype=torch.float32, device=x_RD.device)
        for expert in pair_expert_P.unique().tolist():
            gate_up, down = self._experts[expert]
            pairs = (pair_expert_P == expert).nonzero().squeeze(1)
            out_PD[pairs] = down(swiglu(gate_up(x_RD[pair_row_P[pairs].long()]))).float()
        return out_PD
