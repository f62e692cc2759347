"""SwiGLU, the grouped experts and the norm against slow formulas; bits do not depend on company."""

import math

import pytest
import torch

from kernels.experts import PackedExperts
from kernels.norm import rms_norm
from kernels.swiglu import swiglu


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    x = 4 * torch.randn(50, 26)
    whole = swiglu(x)
    for row in range(0, 50, 7):
        for column in range(13):
            gate, up = float(x[row, column]), float(x[row, 13 + column])
            assert float(whole[row, column]) == pytest.approx(gate / (1 + math.exp(-gate)) * up, rel=1e-5, abs=1e-6)
        assert torch.equal(swiglu(x[row]), whole[row])


def test_the_norm_divides_by_the_root_of_the_mean_square() -> None:
    x, weight = torch.randn(9, 37), torch.randn(37)
    expected = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-3).sqrt() * weight.double()
    whole = rms_norm(x, weight, 1e-3)
    assert torch.allclose(whole.double(), expected, atol=1e-5)
    assert all(torch.equal(rms_norm(x[row : row + 1], weight, 1e-3)[0], whole[row]) for row in range(9))


def loaded(experts: list[int]) -> tuple[PackedExperts, dict[int, tuple[torch.Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)
    packed = PackedExperts(hidden_size=20, intermediate_size=12)
    weights = {}
    for expert in experts:
        weights[expert] = tuple(torch.randn(shape, generator=generator) / 4 for shape in ((12, 20), (12, 20), (20, 12)))
        packed.load(expert, *weights[expert])
    return packed, weights


def test_every_pair_goes_through_its_expert() -> None:
    packed, weights = loaded([3, 8, 1])
    x = torch.randn(6, 20)
    rows, experts = torch.tensor([0, 0, 5, 2, 2, 4, 5]), torch.tensor([3, 1, 1, 8, 3, 8, 3])
    out = packed(x, rows.int(), experts.int())
    for got, row, expert in zip(out, rows.tolist(), experts.tolist(), strict=True):
        gate, up, down = (weight.double() for weight in weights[expert])
        g, u = gate @ x[row].double(), up @ x[row].double()
        assert torch.allclose(got.double(), down @ (g * torch.sigmoid(g) * u), atol=1e-5)
        alone = packed(x[row : row + 1], torch.zeros(1).int(), torch.tensor([expert]).int())
        assert torch.equal(alone[0], got)


@pytest.mark.parametrize(("row", "expert", "error"), [(-1, 3, IndexError), (2, 3, IndexError), (0, 5, KeyError)])
def test_a_pair_of_what_is_not_there_is_refused_and_nothing_is_written(
    row: int, expert: int, error: type[LookupError]
) -> None:
    packed, _ = loaded([3])
    out = torch.full((2, 20), 7.0)
    with pytest.raises(error):
        packed(torch.randn(2, 20), torch.tensor([0, row]).int(), torch.tensor([3, expert]).int(), out)
    assert torch.equal(out, torch.full((2, 20), 7.0))


def test_weights_are_held_once() -> None:
    packed = PackedExperts(hidden_size=64, intermediate_size=96)
    packed.load(0, torch.randn(96, 64), torch.randn(96, 64), torch.randn(64, 96))
    assert packed.nbytes == 3 * 96 * 64 * 4


def test_experts_come_and_go() -> None:
    packed, weights = loaded([3, 8])
    assert packed.experts == (3, 8)
    assert all(torch.equal(got, given) for got, given in zip(packed.unpack(8), weights[8], strict=True))
    packed.unload(3)
    assert packed.experts == (8,)
    with pytest.raises(KeyError):
        packed(torch.randn(1, 20), torch.zeros(1).int(), torch.tensor([3]).int())
    with pytest.raises(ValueError, match="expert 4 has shapes"):
        packed.load(4, *reversed(weights[8]))
