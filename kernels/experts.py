"""The experts of a layer, loaded and unloaded one by one.

Shapes: `R` rows, `P` (row, expert) pairs, `D` model, `I` intermediate, `E` experts, `T` tokens, `K` slots a token.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.lane import Asked
from kernels.native import check_dense, native_for, triton_serves
from kernels.swiglu import PackedNetwork, PlainNetwork, check_expert, common_dtype, make_network


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
        self._triton = triton_serves(device)
        self._device_tables: dict[torch.dtype, Tensor] = {}  # of addresses, int64 [2, E], where Triton computes
        self._experts: dict[int, PlainNetwork | PackedNetwork] = {}
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
        return common_dtype(torch.device(self._device).type, dtypes)

    def load(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Take an expert's weights: gate and up [I, D], down [D, I]; raises ValueError on other shapes."""
        check_expert(expert, (gate, up, down), self._hidden, self._intermediate)
        network = self._experts[expert] = make_network(*(weight.to(self._device) for weight in (gate, up, down)))
        if isinstance(network, PackedNetwork):
            self._place(expert, network.gate_up.address, network.down.address, network.narrow)
        elif self._triton:
            self._place_on_device()

    def unload(self, expert: int) -> None:
        """Drop an expert; raises KeyError when it is not loaded."""
        del self._experts[expert]
        if self._native is not None:
            self._place(expert, 0, 0, False)
        elif self._triton:
            self._place_on_device()

    def unpack(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down of a loaded expert, all of one dtype; see `unpacked_dtype`."""
        return self._experts[expert].unpack()

    def __call__(self, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor, out_PD: Tensor | None = None) -> Tensor:
        """FFN of pair_expert[p] on x[pair_row[p]], unweighted, in the order of the pairs: [P, D] fp32.

        The result is written to `out_PD` (fp32, contiguous) if given. On a GPU, rows and experts of pairs may be on the
        CPU. Raises KeyError for an expert that is not loaded and IndexError for a row that does not exist.
        """
        if out_PD is None:
            out_PD = torch.empty(len(pair_row_P), self._hidden, dtype=torch.float32, device=x_RD.device)
        if self._native is not None:
            self._call_native(self._native, x_RD, pair_row_P, pair_expert_P, out_PD)
            return out_PD
        self._check_pairs(len(x_RD), pair_row_P, pair_expert_P)
        if self._triton:
            self._call_triton(x_RD, pair_expert_P.to(x_RD.device), out_PD, pair_row_P.to(x_RD.device))
            return out_PD
        pair_row_P, pair_expert_P = pair_row_P.to(x_RD.device), pair_expert_P.to(x_RD.device)
        for expert in pair_expert_P.unique().tolist():
            network = self._experts[expert]
            assert isinstance(network, PlainNetwork)
            pairs = (pair_expert_P == expert).nonzero().squeeze(1)
            out_PD[pairs] = network(x_RD[pair_row_P[pairs].long()]).float()
        return out_PD

    def compute_slots(self, x_TD: Tensor, expert_TK: Tensor, out_SD: Tensor) -> None:
        """out[t * K + k] = the network of expert[t, k] applied to x[t]; slots of experts not loaded stay as they are.

        All are on the device and contiguous, `out_SD` fp32; nothing waits for the device. For CUDA with Triton alone.
        """
        assert self._triton
        self._call_triton(x_TD, expert_TK.view(-1), out_SD, None, expert_TK.shape[1])

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
        assert x_RD.shape[1] == self._hidden
        assert experts.shape == rows.shape
        assert out_PD.shape == (len(rows), self._hidden)
        check_dense(torch.float32, out_PD)
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

    def _check_pairs(self, rows: int, pair_row_P: Tensor, pair_expert_P: Tensor) -> None:
        for expert in pair_expert_P.unique().tolist():
            if expert not in self._experts:
                raise KeyError(expert)
        if pair_row_P.numel() and not 0 <= int(pair_row_P.min()) <= int(pair_row_P.max()) < rows:
            raise IndexError(f"a pair names a row outside the {rows} rows")

    def _call_triton(
        self, x_RD: Tensor, expert_P: Tensor, out_PD: Tensor, pair_row_P: Tensor | None, top_k: int = 1
    ) -> None:
        from kernels.gpu.experts import expert_layer

        for dtype, table_2E in self._device_tables.items():
            expert_layer(x_RD.to(dtype).contiguous(), expert_P, table_2E, self._intermediate, out_PD, pair_row_P, top_k)

    def _place_on_device(self) -> None:
        """New tables, one for each dtype; what is being computed goes on with those it began with."""
        numbers = max({1, *self._experts}) + 1  # of one column, no key would be looked at
        tables: dict[torch.dtype, Tensor] = {}
        for dtype in {network.dtype for network in self._experts.values() if isinstance(network, PlainNetwork)}:
            addresses = [
                network.addresses if isinstance(network, PlainNetwork) and network.dtype == dtype else (0, 0)
                for network in (self._experts.get(expert) for expert in range(numbers))
            ]
            tables[dtype] = torch.tensor(addresses, dtype=torch.int64).t().contiguous().to(self._device)
        self._device_tables = tables

    def _place(self, expert: int, gate_up: int, down: int, narrow: bool) -> None:
        """A new table, so that a call that goes on reads the one it began with."""
        before_3E = self._table[0]
        table_3E = torch.zeros(3, max(before_3E.shape[1], expert + 1), dtype=torch.int64)
        table_3E[:, : before_3E.shape[1]] = before_3E
        table_3E[:, expert] = torch.tensor((gate_up, down, narrow))
        self._table = _table(table_3E)
