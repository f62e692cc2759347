"""One layer's experts while they are trained: what `PackedExperts` is to serving."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experts.training.expert import TrainedExpert
from kernels.lane import Asked
from kernels.swiglu import check_expert


class TrainableExperts:
    """Some of one layer's experts, each loaded and unloaded by number. Weights are kept in fp32 as they are stepped."""

    merges = False

    def __init__(self, hidden_size: int, intermediate_size: int, device: str = "cpu") -> None:
        self._hidden = hidden_size
        self._intermediate = intermediate_size
        self._device = device
        self._experts: dict[int, TrainedExpert] = {}

    @property
    def nbytes(self) -> int:
        return sum(expert.nbytes for expert in self._experts.values())

    def unpacked_dtype(self, dtypes: Sequence[torch.dtype]) -> torch.dtype:
        """Of what `unpack` gives, whatever was loaded."""
        return torch.float32

    def load(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Take an expert's weights: gate and up [I, D], down [D, I]; raises ValueError on other shapes."""
        check_expert(expert, (gate, up, down), self._hidden, self._intermediate)
        gate_up = torch.cat((gate.float(), up.float())).to(self._device)
        self._experts[expert] = TrainedExpert(gate_up, down.float().to(self._device, copy=True).contiguous())

    def unload(self, expert: int) -> None:
        """Drop an expert; raises KeyError when it is not loaded."""
        del self._experts[expert]

    def unpack(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down of a loaded expert, low-rank factors aside."""
        held = self._experts[expert]
        gate, up = held.gate_up.chunk(2)
        return gate, up, held.down

    def expert(self, expert: int) -> TrainedExpert:
        """Raises KeyError when it is not loaded."""
        return self._experts[expert]

    def answer(self, lane: int, asked: Asked, held_E: int) -> bool:
        """See `PackedExperts.answer`; these are computed by torch."""
        return False

    def __call__(self, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor, out_PD: Tensor | None = None) -> Tensor:
        """FFN of pair_expert[p] on x[pair_row[p]], unweighted, in the order of the pairs: [P, D] fp32.

        An expert's rows are computed together, in their order: the same rows give the same bits.
        """
        if out_PD is None:
            out_PD = torch.empty(len(pair_row_P), self._hidden, dtype=torch.float32, device=x_RD.device)
        for expert, pair_N in rows_by_expert(pair_expert_P):
            x_ND = x_RD.index_select(0, pair_row_P[pair_N])
            out_PD.index_copy_(0, pair_N, self._experts[expert].forward(x_ND))
        return out_PD


def rows_by_expert(pair_expert_P: Tensor) -> list[tuple[int, Tensor]]:
    """Each expert named, and the places of its pairs in rising order, int64."""
    order_P = torch.argsort(pair_expert_P, stable=True)
    experts, counts = torch.unique_consecutive(pair_expert_P[order_P], return_counts=True)
    return list(zip(experts.tolist(), order_P.split(counts.tolist()), strict=True))
