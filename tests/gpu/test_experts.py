"""Grouped experts against one network at a time in float64; keys left out, any order, any company."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from kernels.gpu import experts as grouped
from kernels.gpu.experts import expert_layer, places
from kernels.gpu.tiles import NARROW, WIDE
from tests.gpu.errors import close

HIDDEN, INTERMEDIATE, EXPERTS, ABSENT = 96, 40, 5, 3


class Layer:
    """Random experts and the table of where they lie."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(4)
        self.gate_up = (torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 8).to(device, dtype)
        self.down = (torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / 8).to(device, dtype)
        addresses = [[weight.data_ptr() for weight in weights] for weights in (self.gate_up, self.down)]
        for each in addresses:
            each[ABSENT] = 0
        self.table = torch.tensor(addresses, dtype=torch.int64, device=device)

    def expected(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = F.linear(x.double(), self.gate_up[expert].double()).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down[expert].double())


@pytest.mark.parametrize("counted", [0, 4096])
def test_places_are_a_stable_sorts(device: str, counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "COUNTED", counted)
    key = torch.randint(0, EXPERTS + 9, (300,), generator=torch.Generator().manual_seed(5)).to(device)
    order, end = places(key, EXPERTS)
    assert torch.equal(order.long(), torch.sort(key, stable=True).indices)
    assert end.tolist() == [int((key <= expert).sum()) for expert in range(EXPERTS)]


@pytest.mark.parametrize("rows", [1, 7, 60])
def test_each_pair_is_float64s_and_those_left_out_stay(device: str, dtype: torch.dtype, rows: int) -> None:
    layer = Layer(device, dtype)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, HIDDEN, generator=generator).to(device, dtype)
    key = torch.randint(0, EXPERTS + 3, (3 * rows,), generator=generator).to(device)
    out = torch.full((3 * rows, HIDDEN), 7.0, device=device)
    expert_layer(x, key, layer.table, INTERMEDIATE, out, top_k=3)
    pairs = torch.arange(3 * rows, device=device)
    named = torch.full_like(out, 7.0)
    expert_layer(x, key, layer.table, INTERMEDIATE, named, pair_row_P=(pairs // 3).int())
    assert torch.equal(named, out)
    for pair, expert in enumerate(key.tolist()):
        if expert == ABSENT or expert >= EXPERTS:
            assert (out[pair] == 7).all()
        else:
            close(out[pair], layer.expected(x[pair // 3], expert), dtype)


def test_one_network_takes_every_row(device: str, dtype: torch.dtype) -> None:
    layer = Layer(device, dtype)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(9, HIDDEN, generator=generator).to(device, dtype)
    add = torch.randn(9, HIDDEN, generator=generator).to(device, dtype)
    out = torch.empty(9, HIDDEN, dtype=dtype, device=device)
    expert_layer(x, x[:, 0], layer.table[:, 2:3], INTERMEDIATE, out, add_PD=add)
    close(out, layer.expected(x, 2) + add.double(), dtype)


@pytest.mark.gpu
def test_a_pair_has_its_bits_in_every_tile_and_company(device: str, dtype: torch.dtype) -> None:
    layer = Layer(device, dtype)
    generator = torch.Generator().manual_seed(7)
    rows = 200 if device == "cuda" else 30
    x = torch.randn(rows, HIDDEN, generator=generator).to(device, dtype)
    key = torch.randint(0, ABSENT, (rows,), generator=generator).to(device)
    alone = torch.empty(rows, HIDDEN, device=device)
    for row in range(0, rows, 7):
        expert_layer(x[row : row + 1], key[row : row + 1], layer.table, INTERMEDIATE, alone[row : row + 1])
    for tile in (WIDE,) if dtype == torch.float32 else NARROW:
        out = torch.empty(rows, HIDDEN, device=device)
        expert_layer(x, key, layer.table, INTERMEDIATE, out, tile=tile)
        assert torch.equal(out[::7], alone[::7]), tile
