"""SwiGLU feed-forward networks.

Shapes: `R` rows, `D` model, `I` intermediate.
"""

import ctypes
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.linear import tiled_linear
from kernels.memory import weight_memory
from kernels.native import native_for, triton_serves
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


class PlainNetwork:
    """One network as torch computes it: in float32 on CPU."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self._dtype = gate.dtype  # and that of the others
        wide = torch.float32 if gate.device.type == "cpu" else None
        self._gate_up = torch.cat((gate, up)).to(dtype=wide)
        self._down = down.to(dtype=wide, copy=True).contiguous()

    @property
    def nbytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in (self._gate_up, self._down))

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self._gate_up.dtype

    @property
    def addresses(self) -> tuple[int, int]:
        """Of [gate; up], [2I, D], and of down, [D, I], both contiguous."""
        return self._gate_up.data_ptr(), self._down.data_ptr()

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = self._gate_up.to(self._dtype).chunk(2)
        return gate, up, self._down.to(self._dtype)

    def __call__(self, x_RD: Tensor) -> Tensor:
        if x_RD.device.type != "cpu":
            return F.linear(swiglu(F.linear(x_RD.to(self._gate_up.dtype), self._gate_up)), self._down)
        return tiled_linear(swiglu(tiled_linear(x_RD.float(), self._gate_up)), self._down)


class PackedNetwork:
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


def make_network(gate: Tensor, up: Tensor, down: Tensor) -> "PlainNetwork | PackedNetwork":
    taken = common_dtype(gate.device.type, (gate.dtype, up.dtype, down.dtype))
    kind = PlainNetwork if native_for(gate.device) is None else PackedNetwork
    return kind(gate.to(taken), up.to(taken), down.to(taken))


def common_dtype(device: str, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """In which all three matrices of a network are taken, and given back."""
    return kept_dtype(*dtypes) if device == "cpu" else reduce(torch.promote_types, dtypes)


class PackedSwiglu:
    """One network: a dense layer's, or the shared experts'."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Weights gate and up [I, D], down [D, I], on the device that computes."""
        self._native = native_for(gate.device)
        self._intermediate, self._hidden = gate.shape
        self._network = make_network(gate, up, down)
        self._table_21: Tensor | None = None
        if isinstance(self._network, PlainNetwork) and triton_serves(gate.device):
            self._table_21 = torch.tensor(self._network.addresses, device=gate.device)[:, None]

    @property
    def nbytes(self) -> int:
        return self._network.nbytes

    def __call__(self, x_TD: Tensor, add_TD: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], plus `add_TD` if given."""
        if isinstance(self._network, PlainNetwork):
            if self._table_21 is not None:
                return self._call_triton(x_TD.to(self._network.dtype).contiguous(), add_TD, self._table_21)
            out_TD = self._network(x_TD)
            return out_TD if add_TD is None else out_TD + add_TD
        assert self._native is not None
        x_TD = x_TD.float().contiguous()
        assert x_TD.shape == (len(x_TD), self._hidden), f"x has shape {tuple(x_TD.shape)}; expected [T, {self._hidden}]"
        add_TD = None if add_TD is None else add_TD.float().contiguous()
        assert add_TD is None or add_TD.shape == x_TD.shape
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

    def _call_triton(self, x_TD: Tensor, add_TD: Tensor | None, table_21: Tensor) -> Tensor:
        from kernels.gpu.experts import expert_layer

        out_TD = torch.empty_like(x_TD)
        add_TD = None if add_TD is None else add_TD.contiguous()
        expert_layer(x_TD, x_TD[:, 0], table_21, self._intermediate, out_TD, add_PD=add_TD)
        return out_TD
