"""Products against float64, and a row's bits in every tile and among any others."""

import pytest
import torch

from kernels.gpu.product import head_products, product
from kernels.gpu.tiles import NARROW, WIDE
from tests.gpu.errors import close


@pytest.mark.parametrize(("rows", "outputs", "inner"), [(1, 40, 96), (5, 33, 72), (70, 130, 256)])
def test_a_product_is_float64s(device: str, dtype: torch.dtype, rows: int, outputs: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inner, generator=generator).to(device, dtype)
    weight = torch.randn(outputs, inner, generator=generator).to(device, dtype)
    add = torch.randn(rows, outputs, generator=generator).to(device, dtype)
    close(product(x, weight, torch.float32), x.double() @ weight.double().t(), dtype)
    out = product(x, weight, dtype, add)
    assert out.dtype == dtype
    close(out, x.double() @ weight.double().t() + add.double(), dtype)


def test_heads_have_products_of_their_own_in_place(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, 50, generator=generator).to(device, dtype)
    weight = torch.randn(3, 20, 32, generator=generator).to(device, dtype)
    out = torch.full((6, 3, 30), 7.0, dtype=dtype, device=device)
    head_products(x[..., :32], weight, out[..., :20])
    close(out[..., :20], torch.einsum("tnk,nok->tno", x[..., :32].double(), weight.double()), dtype)
    assert (out[..., 20:] == 7).all()


@pytest.mark.gpu
def test_a_row_has_its_bits_in_every_tile_and_company(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = 300 if device == "cuda" else 40
    x = torch.randn(rows, 384, generator=generator).to(device, dtype)
    weight = torch.randn(96, 384, generator=generator).to(device, dtype)
    tiles = (WIDE,) if dtype == torch.float32 else NARROW
    wanted = product(x[:1], weight, torch.float32)
    for tile in tiles:
        for first in (0, 3, 17):
            out = product(x[first:].roll(first + 1, 0), weight, torch.float32, tile=tile)
            again = out.roll(-first - 1, 0)
            assert torch.equal(again, product(x, weight, torch.float32, tile=tile)[first:])
        assert torch.equal(product(x, weight, torch.float32, tile=tile)[:1], wanted), tile
