"""ESFT's choice of experts: averages over a sample's tokens, then over samples; the fewest that reach the share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention.training.decoder import ForwardOptions
from attention.training.segments import MicroBatch
from model.snapshots.attempt import begin
from model.snapshots.errors import SnapshotError
from router.gate import Routing
from router.losses import BalanceCoefficients
from services.training.choice import add_relevance, choose, choose_once, chosen_pairs, relevance
from services.training.identity import Identity
from tests.training.rig import Rig, make_rig, samples


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


def look(rig: Rig, batches: Sequence[MicroBatch], by: str) -> dict[int, torch.Tensor]:
    coordinator, placement = rig.workers[0]._coordinator, rig.table.placement
    assert coordinator is not None
    coordinator.restart(placement)
    coordinator.begin(placement, 0, 1, 1)
    rig.clients[0].begin(0, placement)
    return relevance(rig.workers[0]._decoder, batches, by)


@pytest.mark.parametrize("by", ["gate", "token"])
def test_relevance_does_not_depend_on_how_samples_are_laid(checkpoint: Callable[[str], Path], by: str) -> None:
    rig = make_rig(checkpoint("mini"), 2)
    whole = samples(512, (9, 30), 3)
    apart = [
        MicroBatch(whole.token_T[part], whole.target_T[part], whole.position_T[part], (length,))
        for part, length in ((slice(0, 9), 9), (slice(9, 39), 30))
    ]
    together, alone = look(rig, [whole], by), look(rig, apart, by)
    assert set(together) == set(rig.checkpoint.config.moe_layers)
    for layer, found in together.items():
        assert found.sum() == pytest.approx(1.0)
        assert torch.allclose(found, alone[layer], atol=1e-6)


@pytest.mark.parametrize("by", ["gate", "token"])
def test_relevance_is_that_of_a_model_that_drops_nothing(checkpoint: Callable[[str], Path], by: str) -> None:
    drops = ForwardOptions(balance=BalanceCoefficients(0.003, 0.05, 0.02), drop=True)
    dropping, plain = make_rig(checkpoint("mini"), 2, options=drops), make_rig(checkpoint("mini"), 2)
    batch = samples(512, (9, 30), 3)
    found, wanted = look(dropping, [batch], by), look(plain, [batch], by)
    assert dropping.workers[0]._decoder.losses(batch, 0).dropped > 0
    assert all(torch.equal(found[layer], wanted[layer]) for layer in wanted)


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


def identity(share: float = 0.2, data: str = "d") -> Identity:
    return Identity({"esft": {"by": "gate", "share": share, "samples": 32}}, data, "m")


def test_experts_are_chosen_once_for_a_run_and_anew_for_another_choice(tmp_path: Path) -> None:
    assert choose_once(tmp_path, identity(), lambda: ((1, 2), (2, 5))) == ((1, 2), (2, 5))
    assert choose_once(tmp_path, identity(), lambda: pytest.fail("looked twice")) == ((1, 2), (2, 5))
    assert choose_once(tmp_path, identity(share=0.9), lambda: ((1, 3),)) == ((1, 3),)
    assert choose_once(tmp_path, identity(share=0.9, data="e"), lambda: ((1, 4),)) == ((1, 4),)


def test_another_choice_is_refused_where_the_earlier_one_was_trained(tmp_path: Path) -> None:
    choose_once(tmp_path, identity(share=0.5), lambda: ((1, 7),))
    begin(tmp_path / "snapshots", 4)  # an attempt that was not finished has trained nothing
    choose_once(tmp_path, identity(), lambda: ((1, 2),))
    (tmp_path / "snapshots" / "step-00000004").mkdir(parents=True)
    with pytest.raises(SnapshotError, match=r"were chosen otherwise: share was 0.2 and is 0.9; give the same recipe"):
        choose_once(tmp_path, identity(share=0.9), lambda: pytest.fail("looked"))
    assert choose_once(tmp_path, identity(), lambda: pytest.fail("looked")) == ((1, 2),)
    (tmp_path / "experts.json").write_text("[[1, 2]")
    with pytest.raises(SnapshotError, match="are not known any more"):
        choose_once(tmp_path, identity(), lambda: pytest.fail("looked"))


def test_what_an_earlier_version_chose_is_known_by_its_name_for_the_model(tmp_path: Path) -> None:
    choose_once(tmp_path, replace(identity(), model="m"), lambda: ((1, 2),))
    now = replace(identity(), model="f-2-n", first_model="m")
    assert choose_once(tmp_path, now, lambda: pytest.fail("looked")) == ((1, 2),)
    assert choose_once(tmp_path, replace(now, first_model="o"), lambda: ((1, 4),)) == ((1, 4),)
    assert choose_once(tmp_path, now, lambda: pytest.fail("looked")) == ((1, 4),)  # kept under the new name
