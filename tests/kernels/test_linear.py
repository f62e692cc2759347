"""A row of a linear map has the right value, and the same bits in any company."""

import pytest
import torch

from kernels.heads import PackedHeads
from kernels.linear import PackedLinear


@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (31, 7), (64, 96), (257, 130), (96, 33), (7, 500)])
def test_it_multiplies_and_bits_do_not_depend_on_the_row_count(inner: int, outer: int) -> None:
    generator = torch.Generator().manual_seed(inner)
    weight = torch.randn(outer, inner, generator=generator)
    linear = PackedLinear(weight)
    x = torch.randn(70, inner, generator=generator)
    whole = linear(x)
    assert torch.allclose(whole.double(), x.double() @ weight.double().T, atol=1e-4)
    for count in [*range(1, 20), 31, 32, 33, 64, 65]:
        assert torch.equal(linear(x[:count]), whole[:count])
        assert torch.equal(linear(x[70 - count :]), whole[70 - count :])


def test_leading_dimensions_are_kept_and_no_rows_are_fine() -> None:
    linear = PackedLinear(torch.randn(5, 3))
    assert linear(torch.randn(2, 4, 3)).shape == (2, 4, 5)
    assert linear(torch.randn(0, 3)).shape == (0, 5)


def test_the_weight_comes_back() -> None:
    weight = torch.randn(33, 65)
    assert torch.equal(PackedLinear(weight).unpack(), weight)


def test_low_precision_weights_are_computed_in_fp32() -> None:
    weight, x = torch.randn(40, 24).bfloat16(), torch.randn(6, 24)
    assert torch.allclose(PackedLinear(weight)(x), x @ weight.float().T, atol=1e-5)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(3,\); expected \[out_features, in_features\]"):
        PackedLinear(torch.randn(3))
    with pytest.raises(ValueError, match="4 features; expected 3"):
        PackedLinear(torch.randn(2, 3))(torch.randn(1, 4))


def test_heads_multiply_each_by_its_own_matrix() -> None:
    weight, x = torch.randn(3, 10, 6), torch.randn(7, 3, 6)
    expected = torch.einsum("tni,noi->tno", x.double(), weight.double())
    heads = PackedHeads(weight)
    assert torch.allclose(heads(x).double(), expected, atol=1e-5)
    assert torch.equal(heads(x[:2]), heads(x)[:2])
