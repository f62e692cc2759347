"""SwiGLU feed-forward networks: one, and the many of an expert layer.

Shapes: `R` rows, `P` (row, expert) pairs, `D` model, `I` intermediate, `E` experts.
"""

import ctypes
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.lane import Asked
from kernels.linear import tiled_linear
from kernels.memory import weight_memory
from kernels.native import native_for
from kernels.packed import PANEL, PackedMatrix, kept_dtype, packed_numbers


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) times second half, [..., 2I] -> [..., I].

    On CPU the sigmoid is taken in float64: torch's vector and scalar exponentials differ in the last bit of
    float32, and which of them an element meets depends on where it lies in the tensor.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.device.type != "cpu":
        return F.silu(gate) * up
    return gate * torch.sigmoid(gate.double()).to(gate.dtype) * up


def check_expert(expert: int, matrices: tuple[Tensor, Tensor, Tensor], hidden: int, intermediate: int) -> None:
    """Raises ValueError unless gate and up are [I, D] and down [D, I]."""
    wide, tall = (intermediate, hidden), (hidden, intermediate)
    shapes = tuple(tuple(matrix.shape) for matrix in matrices)
    if shapes != (wide, wide, tall):
        raise ValueError(f"expert {expert} has shapes {shapes}; expected {(wide, wide, tall)}")


class _Plain:
    """One network as torch computes it: in float32 on CPU."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self._dtype = gate.dtype  # and that of the others
        wide = torch.float32 if gate.device.type == "cpu" else None
        self._gate_up = torch.cat((gate, up)).to(dtype=wide)
        self._down = down.to(dtype=wide, copy=True).contiguous()

    @property
    def nbytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in (self._gate_up, self._down))

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = self._gate_up.to(self._dtype).chunk(2)
        return gate, up, self._down.to(self._dtype)

    def __call__(self, x_RD: Tensor) -> Tensor:
        if x_RD.device.type != "cpu":
            return F.linear(swiglu(F.linear(x_RD.to(self._gate_up.dtype), self._gate_up)), self._down)
        return tiled_linear(swiglu(tiled_linear(x_RD.float(), self._gate_up)), self._down)


class _Packed:
    """One network for the native kernels: gate's and up's panels in turn, and down's."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        intermediate, hidden = gate.shape
        depth = -(-intermediate // PANEL) * PANEL  # down's left side is the hidden row, which fills whole panels
        first = packed_numbers(intermediate, hidden, 2)
        memory = weight_memory(first + packed_numbers(hidden, depth), gate.dtype)
        self.gate_up = PackedMatrix(gate, up, memory=memory)
        self.down = PackedMatrix(down, depth=depth, memory=memory[first:])

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    @property
    def narrow(self) -> bool:
        return self.gate_up.narrow

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_up.unpack(0), self.gate_up.unpack(1), self.down.unpack()


def _network(gate: Tensor, up: Tensor, down: Tensor) -> "_Plain | _Packed":
    taken = _common_dtype(gate.device.type, (gate.dtype, up.dtype, down.dtype))
    kind = _Plain if native_for(gate.device) is None else _Packed
    return kind(gate.to(taken), up.to(taken), down.to(taken))


def _common_dtype(device: str, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """In which all three matrices of a network are taken, and given back."""
    return kept_dtype(*dtypes) if device == "cpu" else reduce(torch.promote_types, dtypes)


def _table(table_3E: Tensor) -> tuple[Tensor, int, int, int]:
    """A table and where its rows lie."""
    return table_3E, table_3E[0].data_ptr(), table_3E[1].data_ptr(), table_3E[2].data_ptr()


class PackedExperts:
    """Some of one layer's experts, each loaded and unloaded by number."""

    merges = True  # a row's bits are the same whatever rows are computed with it

    def __init__(self, hidden_size: int, intermediate_size: int, device: str = "cpu") -> None:
        self._hidden = hidden_size
        self._intermediate = intermediate_size
        self._device = device
        self._native = native_for(device)
        self._experts: dict[int, _Plain | _Packed] = {}
        # addresses of gate_up and down, 0 where none is loaded, and whether they are bf16
        self._table = _table(torch.zeros(3, 0, dtype=torch.int64))

    @property
    def experts(self) -> tuple[int, ...]:
        return tuple(sorted(self._experts))

    @property
    def nbytes(self) -> int:
        return sum(expert.nbytes for expert in self._experts.values())

    def unpacked_dtype(self, dtypes: Sequence[torch.dtype]) -> torch.dtype:
        """Of what `unpack` gives, for an expert whose gate, up and down were of these."""
        return _common_dtype(torch.device(self._device).type, dtypes)

    def load(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Take an expert's weights: gate and up [I, D], down [D, I]; raises ValueError on other shapes."""
        check_expert(expert, (gate, up, down), self._hidden, self._intermediate)
        network = self._experts[expert] = _network(*(weight.to(self._device) for weight in (gate, up, down)))
        if isinstance(network, _Packed):
            self._place(expert, network.gate_up.address, network.down.address, network.narrow)

    def unload(self, expert: int) -> None:
        """Drop an expert; raises KeyError when it is not loaded."""
        del self._experts[expert]
        if self._native is not None:
            self._place(expert, 0, 0, False)

    def unpack(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down of a loaded expert, all of one dtype; see `unpacked_dtype`."""
        return self._experts[expert].unpack()

    def __call__(self, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor, out_PD: Tensor | None = None) -> Tensor:
        """FFN of pair_expert[p] on x[pair_row[p]], unweighted, in the order of the pairs: [P, D] fp32.

        The result is written to `out_PD` (fp32, contiguous) if given. Raises KeyError for an expert that is not
        loaded and IndexError for a row that does not exist.
        """
        if out_PD is None:
            out_PD = torch.empty(len(pair_row_P), self._hidden, dtype=torch.float32, device=x_RD.device)
        if self._native is not None:
            self._call_native(self._native, x_RD, pair_row_P, pair_expert_P, out_PD)
            return out_PD
        for expert in pair_expert_P.unique().tolist():
            network = self._experts[expert]
            assert isinstance(network, _Plain)
            pairs = (pair_expert_P == expert).nonzero().squeeze(1)
            out_PD[pairs] = network(x_RD[pair_row_P[pairs].long()]).float()
        return out_PD

    def answer(self, lane: int, asked: Asked, held_E: int) -> bool:
        """Compute a request where it lies in a lane, for the experts that the array of bool at `held_E` names.

        False, and nothing was answered, where it names others or rows that do not exist, or torch computes.
        """
        if self._native is None:
            return False
        table_3E, gate_up, down, narrow = self._table  # a load may put a new one in its place meanwhile
        bad = self._native.shoal_answer(
            lane, ctypes.byref(asked), gate_up, down, narrow, held_E, table_3E.shape[1], self._intermediate
        )
        return bool(bad == 0)

    def _call_native(
        self, native: ctypes.CDLL, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor, out_PD: Tensor
    ) -> None:
        x_RD, rows, experts = x_RD.float().contiguous(), pair_row_P.int().contiguous(), pair_expert_P.int().contiguous()
        table_3E, gate_up, down, narrow = self._table
        assert out_PD.is_contiguous()
        bad = native.shoal_experts(
            x_RD.data_ptr(),
            self._hidden,
            len(x_RD),
            len(rows),
            rows.data_ptr(),
            experts.data_ptr(),
            gate_up,
            down,
            narrow,
            table_3E.shape[1],
            self._hidden,
            self._intermediate,
            out_PD.data_ptr(),
            self._hidden,
            None,
        )
        if bad:
            row, expert = int(rows[bad - 1]), int(experts[bad - 1])
            if expert not in self._experts:
                raise KeyError(expert)
            raise IndexError(f"pair {bad - 1} names row {row} of {len(x_RD)}")

    def _place(self, expert: int, gate_up: int, down: int, narrow: bool) -> None:
        """A new table, so that a call that goes on reads the one it began with."""
        before_3E = self._table[0]
        table_3E = torch.zeros(3, max(before_3E.shape[1], expert + 1), dtype=torch.int64)
        table_3E[:, : before_3E.shape[1]] = before_3E
        table_3E[:, expert] = torch.tensor((gate_up, down, narrow))
        self._table = _table(table_3E)


class PackedSwiglu:
    """One network: a dense layer's, or the shared experts'."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Weights gate and up [I, D], down [D, I], on the device that computes."""
        self._native = native_for(gate.device)
        self._intermediate, self._hidden = gate.shape
        self._network = _network(gate, up, down)

    @property
    def nbytes(self) -> int:
        return self._network.nbytes

    def __call__(self, x_TD: Tensor, add_TD: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], plus `add_TD` if given."""
        if isinstance(self._network, _Plain):
            out_TD = self._network(x_TD)
            return out_TD if add_TD is None else out_TD + add_TD
        assert self._native is not None
        x_TD = x_TD.float().contiguous()
        add_TD = None if add_TD is None else add_TD.float().contiguous()
        out_TD = torch.empty_like(x_TD)
        network = self._network
        table = (ctypes.c_long * 3)(network.gate_up.address, network.down.address, network.narrow)
        start, step = ctypes.addressof(table), ctypes.sizeof(ctypes.c_long)
        self._native.shoal_experts(
            x_TD.data_ptr(),
            self._hidden,
            len(x_TD),
            len(x_TD),
            None,
            None,
            start,
            start + step,
            start + 2 * step,
            1,
            self._hidden,
            self._intermediate,
            out_TD.data_ptr(),
            self._hidden,
            None if add_TD is None else add_TD.data_ptr(),
        )
        return out_TD
