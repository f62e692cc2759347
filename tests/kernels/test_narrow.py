"""Weights that are kept in bf16 take half the memory and compute the same bits as the same numbers in fp32."""

import pytest
import torch
from torch import Tensor

from kernels.experts import PackedExperts
from kernels.heads import PackedHeads
from kernels.linear import PackedLinear
from kernels.packed import kept_dtype
from kernels.swiglu import PackedSwiglu, common_dtype

NARROW, WIDE = torch.bfloat16, torch.float32


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """bf16 of very unlike magnitudes, zeros, negative zeros and subnormal ones among them."""
    drawn = torch.randn(*shape, generator=generator) * 10.0 ** torch.randint(-12, 2, shape, generator=generator)
    drawn.view(-1)[::17] = -0.0
    drawn.view(-1)[5::23] = 1e-39
    return drawn.bfloat16()


def halved(kernels: str) -> int:
    """By what the memory of narrow weights is divided: torch keeps them wide on CPUs."""
    return 1 if kernels == "torch" else 2


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 40, 300])
def test_a_narrow_weight_computes_the_bits_of_the_wide_one(kernels: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = numbers(generator, 77, 210), torch.randn(rows, 210, generator=generator)
    narrow, wide = PackedLinear(weight), PackedLinear(weight.float())
    assert torch.equal(narrow(x), wide(x))
    assert torch.allclose(narrow(x).double(), x.double() @ weight.double().T, atol=1e-3)
    assert torch.equal(narrow.unpack().float(), weight.float())
    assert narrow.nbytes == wide.nbytes // halved(kernels)


def test_narrow_heads_compute_the_bits_of_wide_ones(kernels: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = numbers(generator, 3, 40, 18), torch.randn(29, 3, 18, generator=generator)
    narrow, wide = PackedHeads(weight), PackedHeads(weight.float())
    assert torch.equal(narrow(x), wide(x))
    assert narrow.nbytes == wide.nbytes // halved(kernels)


def test_a_narrow_network_computes_the_bits_of_a_wide_one(kernels: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = numbers(generator, 72, 200), numbers(generator, 72, 200), numbers(generator, 200, 72)
    x = torch.randn(33, 200, generator=generator)
    narrow, wide = PackedSwiglu(*weights), PackedSwiglu(*(weight.float() for weight in weights))
    assert torch.equal(narrow(x, x), wide(x, x))
    assert narrow.nbytes == wide.nbytes // halved(kernels)


def test_narrow_and_wide_experts_serve_one_call(kernels: str) -> None:
    generator = torch.Generator().manual_seed(3)
    mixed, wide = PackedExperts(200, 72), PackedExperts(200, 72)
    given = {}
    for expert in range(6):
        weights = numbers(generator, 72, 200), numbers(generator, 72, 200), numbers(generator, 200, 72)
        wide.load(expert, *(weight.float() for weight in weights))
        # 0 and 3 are narrow, 1 and 4 wide, and of 2 and 5 one matrix alone is narrow, so that all three are kept wide
        dtypes = ((NARROW, NARROW, NARROW), (WIDE, WIDE, WIDE), (NARROW, WIDE, WIDE))[expert % 3]
        given[expert] = tuple(weight.to(dtype) for weight, dtype in zip(weights, dtypes, strict=True))
        mixed.load(expert, *given[expert])
    x = torch.randn(90, 200, generator=generator)
    rows = torch.randint(90, (500,), generator=generator).int()
    chosen = torch.randint(6, (500,), generator=generator).int()
    assert torch.equal(mixed(x, rows, chosen), wide(x, rows, chosen))
    assert mixed.nbytes * 6 == wide.nbytes * (5 if halved(kernels) == 2 else 6)
    for expert, weights in given.items():
        for got, weight in zip(mixed.unpack(expert), weights, strict=True):
            assert got.dtype == (NARROW if expert % 3 == 0 else WIDE)
            assert got.dtype == mixed.unpacked_dtype([each.dtype for each in weights])
            assert torch.equal(got.float(), weight.float())
    mixed.unload(0)
    mixed.load(0, *(weight.float() for weight in given[0]))
    assert torch.equal(mixed(x, rows, chosen), wide(x, rows, chosen))


def test_what_the_three_matrices_of_a_network_are_taken_in() -> None:
    """A GPU computes in what holds all three, a CPU in fp32 unless all are bf16."""
    half = torch.float16
    for dtypes, on_gpu, on_cpu in (
        ((NARROW, NARROW, NARROW), NARROW, NARROW),
        ((half, half, half), half, WIDE),
        ((NARROW, NARROW, half), WIDE, WIDE),
        ((NARROW, WIDE, NARROW), WIDE, WIDE),
        ((WIDE, WIDE, WIDE), WIDE, WIDE),
    ):
        assert common_dtype("cuda", dtypes) == on_gpu
        assert common_dtype("cpu", dtypes) == on_cpu


def test_what_a_cpu_keeps() -> None:
    assert kept_dtype(NARROW) == kept_dtype(NARROW, NARROW, NARROW) == NARROW
    half = torch.float16
    for others in ((WIDE,), (half,), (torch.float64,), (NARROW, WIDE, NARROW), (NARROW, NARROW, half)):
        assert kept_dtype(*others) == WIDE
