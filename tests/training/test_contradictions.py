"""What contradicts itself, or makes no sense, is refused where it is made, and named."""

from dataclasses import replace

import pytest
import torch

from attention.training.segments import MicroBatch
from experts.training.adamw import AdamW
from experts.training.ledger import StepLedger
from experts.training.spec import LowRank, as_pairs
from tests.training.test_grpc import request


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x_RD": torch.zeros(3, 7)}, "x and dout are"),
        ({"dout_RD": torch.zeros(2, 8)}, "x and dout are"),
        ({"x_RD": torch.zeros(24), "dout_RD": torch.zeros(24)}, "expected \\[rows, hidden\\] twice"),
        ({"pair_row_P": torch.zeros(4, dtype=torch.int32)}, "equally long"),
        ({"pair_expert_P": torch.zeros(4, dtype=torch.int32)}, "equally long"),
        ({"answer_P": torch.zeros(4, dtype=torch.int32)}, "equally long"),
        ({"pair_row_P": torch.zeros(5, dtype=torch.int64)}, "int32"),
        ({"pair_expert_P": torch.zeros(5, dtype=torch.int64)}, "int32"),
        ({"answer_P": torch.zeros(5, dtype=torch.bool)}, "int32"),
        ({"pair_weight_P": torch.zeros(4)}, "pair_weight is \\(4,\\); expected \\(5,\\)"),
        ({"pair_weight_P": torch.zeros(5).double()}, "pair_weight is torch.float64"),
        ({"x_RD": torch.zeros(3, 8).half()}, "x is torch.float16"),
        ({"dout_RD": torch.zeros(3, 8).bfloat16()}, "dout is torch.bfloat16"),
    ],
)
def test_a_backward_request_whose_tensors_do_not_agree(changed: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(request(), **changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("beta2", -1e-9), ("eps", 0.0), ("weight_decay", -0.1)],
)
def test_an_optimizer_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        AdamW(**{field: value})


@pytest.mark.parametrize(("rank", "alpha", "said"), [(0, 1.0, "lora.rank is 0"), (1, 0.0, "lora.alpha is 0.0")])
def test_factors_of_no_rank_or_no_scale(rank: int, alpha: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LowRank(rank, alpha)
    assert LowRank(2, 1.0).scale == 0.5


@pytest.mark.parametrize(("step", "micros", "ranks"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_a_step_of_nothing(step: int, micros: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="is none"):
        StepLedger(step, micros, ranks)


@pytest.mark.parametrize(("micro", "rank"), [(-1, 0), (2, 0), (0, -1), (0, 3)])
def test_a_turn_that_a_step_does_not_have(micro: int, rank: int) -> None:
    with pytest.raises(ValueError, match="step 4 has 2 on 3 workers"):
        StepLedger(4, 2, 3).turn(micro, rank)


def test_turns_go_by_micro_batch_and_then_by_rank() -> None:
    ledger = StepLedger(4, 2, 3)
    assert [ledger.turn(micro, rank) for micro in range(2) for rank in range(3)] == list(range(6))


@pytest.mark.parametrize("raw", [[[1, "2"]], [[1.0, 2]], [[True, 2]], [[1]], [1], [[1, 2, 3]]])
def test_pairs_that_are_none(raw: list[list[int]]) -> None:
    with pytest.raises((TypeError, ValueError)):
        as_pairs(raw)


@pytest.mark.parametrize(
    ("targets", "positions", "ends"),
    [(3, 4, (4,)), (4, 3, (4,)), (4, 4, ()), (4, 4, (3,)), (4, 4, (5,)), (4, 4, (2, 2, 4)), (4, 4, (3, 2, 4))],
)
def test_a_micro_batch_whose_samples_do_not_divide_its_tokens(
    targets: int, positions: int, ends: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="4 tokens"):
        MicroBatch(torch.zeros(4), torch.zeros(targets), torch.zeros(positions), ends)
