"""ESFT's choice of experts: averages over a sample's tokens, then over samples; the fewest that reach the share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention.training.segments import MicroBatch
from router.gate import Routing
from services.training.choice import add_relevance, choose, chosen_pairs, relevance
from tests.training.rig import make_rig, samples


def test_a_long_sample_counts_no_more_than_a_short_one() -> None:
    experts_TK = torch.tensor([[0, 1], [0, 1], [0, 2], [3, 1]])
    weights_TK = torch.tensor([[0.5, 0.25], [0.5, 0.125], [0.5, 0.25], [1.0, 0.5]])
    share_T = torch.tensor(
        [1 / 3, 1 / 3, 1 / 3, 1.0], dtype=torch.float64
    )  # three tokens of one sample, one of another
    gate_E, token_E = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    add_relevance(gate_E, Routing(experts_TK, weights_TK), share_T, "gate")
    add_relevance(token_E, Routing(experts_TK, weights_TK), share_T, "token")
    assert gate_E.tolist() == pytest.approx([0.5, 0.375 / 3 + 0.5, 0.25 / 3, 1.0])
    assert token_E.tolist() == pytest.approx([1.0, 2 / 3 + 1, 1 / 3, 1.0])


@pytest.mark.parametrize("by", ["gate", "token"])
def test_relevance_does_not_depend_on_how_samples_are_laid(checkpoint: Callable[[str], Path], by: str) -> None:
    rig = make_rig(checkpoint("mini"), 2)
    coordinator, placement = rig.workers[0]._coordinator, rig.table.placement
    assert coordinator is not None
    coordinator.restart(placement)
    coordinator.begin(placement, 0, 1, 1)
    rig.clients[0].begin(0, placement)
    decoder = rig.workers[0]._decoder
    whole = samples(512, (9, 30), 3)
    apart = [
        MicroBatch(whole.token_T[part], whole.target_T[part], whole.position_T[part], (length,))
        for part, length in ((slice(0, 9), 9), (slice(9, 39), 30))
    ]
    together, alone = relevance(decoder, [whole], by), relevance(decoder, apart, by)
    assert set(together) == set(decoder.config.moe_layers)
    for layer, found in together.items():
        assert found.sum() == pytest.approx(1.0)
        assert torch.allclose(found, alone[layer], atol=1e-6)


@pytest.mark.parametrize(
    ("share", "chosen"),
    [(0.01, [2]), (0.4, [2]), (0.41, [0, 2]), (0.7, [0, 2]), (0.71, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_the_fewest_experts_that_reach_the_share_are_chosen(share: float, chosen: list[int]) -> None:
    found = torch.tensor([0.3, 0.2, 0.4, 0.1], dtype=torch.float64)
    assert choose(found, share) == chosen
    assert chosen_pairs({3: found}, share) == tuple((3, expert) for expert in chosen)


def test_of_equal_experts_the_lower_number_is_chosen() -> None:
    assert choose(torch.full((4,), 0.25, dtype=torch.float64), 0.5) == [0, 1]
