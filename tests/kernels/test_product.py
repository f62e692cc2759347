"""A product of two matrices in whatever order they lie: its value, and that threads and company change no bit."""

import pytest
import torch

from kernels.product import LEAST, product
from kernels.threads import set_threads

SHAPES = [(LEAST, 1, LEAST), (200, 37, 130), (131, 300, 2100), (300, 5, 2500), (64, 40, 200), (200, 40, 64)]


def drawn(rows: int, columns: int, turned: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.randn(columns, rows, generator=generator).t()
        if turned
        else torch.randn(rows, columns, generator=generator)
    )


@pytest.mark.parametrize("b_turned", [False, True])
@pytest.mark.parametrize("a_turned", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outputs"), SHAPES)
def test_it_multiplies_matrices_that_lie_either_way(
    rows: int, inner: int, outputs: int, a_turned: bool, b_turned: bool
) -> None:
    a, b = drawn(rows, inner, a_turned), drawn(inner, outputs, b_turned)
    assert torch.allclose(product(a, b).double(), a.double() @ b.double(), atol=1e-4)


def test_parts_of_matrices_and_what_lies_in_no_order_are_multiplied_too() -> None:
    a, b = torch.randn(150, 90)[:, 3:70], torch.randn(67, 300)[:, ::2]
    assert torch.allclose(product(a, b), a @ b, atol=1e-4)


def test_more_outputs_than_are_packed_at_once_are_all_there() -> None:
    a, b = torch.randn(LEAST, 4096), torch.randn(4096, 1100)  # 2^21 numbers are 512 outputs of these
    assert torch.allclose(product(a, b).double(), a.double() @ b.double(), atol=2e-3)


def test_nothing_is_fine_and_what_does_not_fit_is_refused() -> None:
    assert product(torch.randn(0, 5), torch.randn(5, 300)).shape == (0, 300)
    assert torch.equal(product(torch.randn(200, 0), torch.randn(0, 300)), torch.zeros(200, 300))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        product(torch.randn(200, 5), torch.randn(6, 300))


def test_bits_depend_on_the_row_and_the_column_alone(kernels: str) -> None:
    if kernels == "torch":
        pytest.skip("torch's own products may sum differently")
    a, b = torch.randn(400, 70), torch.randn(70, 400)
    try:
        set_threads(1)
        alone = product(a, b)
        set_threads(2)
        assert torch.equal(product(a, b), alone)
        assert torch.equal(product(a[100:300], b[:, 50:250]), alone[100:300, 50:250])
        assert torch.equal(product(b.t(), a.t()), alone.t())
    finally:
        set_threads(1)
