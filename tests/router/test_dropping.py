"""Token dropping against a slow oracle, and what it promises about budgets, protection, ties and order."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig, parse_config
from router.dropping import drop_tokens, group_budget, protected_sequences
from router.gate import route
from tests.model.shapes import V2, V2_LITE

FULL, LITE = parse_config(V2), parse_config(V2_LITE)
MINIATURE = replace(FULL, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
CONFIGS = {"v2": FULL, "lite": LITE, "miniature": MINIATURE}


def by_removal(
    experts: list[list[int]], affinity: list[list[float]], protected: list[bool], config: ModelConfig, capacity: float
) -> list[list[bool]]:
    """While a device is over its budget, take away the unprotected slot that it likes least, the last of equals."""
    keep = [[True] * len(row) for row in experts]
    slots = sum(len(row) for row in experts)
    budget = math.ceil(capacity * slots / config.n_group)
    for device in range(config.n_group):
        size = config.n_routed_experts // config.n_group
        mine = [(t, k) for t, row in enumerate(experts) for k, expert in enumerate(row) if expert // size == device]
        while sum(keep[t][k] for t, k in mine) > budget:
            candidates = [(affinity[t][k], -t, -k) for t, k in mine if keep[t][k] and not protected[t]]
            if not candidates:
                break
            _, later_t, later_k = min(candidates)
            keep[-later_t][-later_k] = False
    return keep


def routed(config: ModelConfig, tokens: int, seed: int = 0, skew: float = 2.0) -> tuple[Tensor, Tensor]:
    """Chosen experts and their affinities, of tokens that all prefer some experts."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, config.n_routed_experts, generator=generator)
    logits_TE += torch.randn(config.n_routed_experts, generator=generator) * skew
    routing = route(logits_TE, config)
    return routing.experts_TK, routing.weights_TK


def nobody(experts_TK: Tensor) -> Tensor:
    return torch.zeros(len(experts_TK), dtype=torch.bool)


def some(experts_TK: Tensor, share: float, seed: int = 0) -> Tensor:
    return torch.rand(len(experts_TK), generator=torch.Generator().manual_seed(seed)) < share


def group_loads(experts_TK: Tensor, keep_TK: Tensor, config: ModelConfig) -> Tensor:
    return torch.bincount(experts_TK[keep_TK] * config.n_group // config.n_routed_experts, minlength=config.n_group)


@settings(max_examples=80)
@given(
    tokens=st.integers(0, 24),
    levels=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    capacity=st.sampled_from([0.25, 0.5, 1.0, 1.1, 2.0]),
    seed=st.integers(0, 1000),
)
def test_what_is_dropped_is_what_the_oracle_removes(
    tokens: int, levels: int, share: float, capacity: float, seed: int
) -> None:
    """Few levels of affinity make ties."""
    experts_TK, weights_TK = routed(MINIATURE, tokens, seed)
    affinity_TK = (weights_TK * levels).round()
    protected_T = some(experts_TK, share, seed)
    dropped = drop_tokens(experts_TK, affinity_TK, protected_T, MINIATURE, capacity)
    expected = by_removal(experts_TK.tolist(), affinity_TK.tolist(), protected_T.tolist(), MINIATURE, capacity)
    assert dropped.keep_TK.tolist() == expected
    assert dropped.slots == tokens * 4
    assert dropped.dropped == sum(not kept for row in expected for kept in row)


@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("name", ["v2", "miniature"])
def test_no_device_keeps_more_than_its_budget(name: str, capacity: float) -> None:
    config = CONFIGS[name]
    experts_TK, affinity_TK = routed(config, 500)
    dropped = drop_tokens(experts_TK, affinity_TK, nobody(experts_TK), config, capacity)
    budget = group_budget(experts_TK.numel(), config.n_group, capacity)
    before_G = group_loads(experts_TK, torch.ones_like(dropped.keep_TK), config)
    assert before_G.max() > budget > before_G.min()
    assert torch.equal(group_loads(experts_TK, dropped.keep_TK, config), before_G.clamp(max=budget))
    assert 0 < dropped.dropped == int((~dropped.keep_TK).sum())


def test_dropped_slots_are_the_lowest_of_their_device() -> None:
    experts_TK, affinity_TK = routed(FULL, 500)
    keep_TK = drop_tokens(experts_TK, affinity_TK, nobody(experts_TK), FULL).keep_TK
    group_TK = experts_TK // 20
    for group in group_TK[~keep_TK].unique():
        mine = group_TK == group
        assert affinity_TK[mine & ~keep_TK].max() <= affinity_TK[mine & keep_TK].min()


def test_budget_of_average_load_is_rounded_up() -> None:
    assert group_budget(12, 4, 1.0) == 3
    assert group_budget(13, 4, 1.0) == 4
    assert group_budget(12, 4, 0.5) == 2
    assert group_budget(0, 4, 1.0) == 0


def test_even_load_loses_nothing() -> None:
    experts_TK = torch.arange(16).view(4, 4).repeat(3, 1)
    affinity_TK = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    dropped = drop_tokens(experts_TK, affinity_TK, nobody(experts_TK), MINIATURE)
    assert dropped.keep_TK.all()
    assert dropped.dropped == 0


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_protected_tokens_keep_all_their_slots(share: float) -> None:
    experts_TK, affinity_TK = routed(FULL, 500)
    protected_T = some(experts_TK, share)
    affinity_TK[protected_T] = 0.0
    dropped = drop_tokens(experts_TK, affinity_TK, protected_T, FULL)
    assert dropped.keep_TK[protected_T].all()
    assert dropped.dropped > 0


def test_protected_slots_take_up_budget() -> None:
    """16 slots, a budget of 4, all on one device: one protected token of 4 slots leaves nothing for the others."""
    experts_TK = torch.tensor([[0, 1, 2, 3]] * 4)
    affinity_TK = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    one = torch.tensor([False, False, True, False])
    assert drop_tokens(experts_TK, affinity_TK, one, MINIATURE).keep_TK.any(1).tolist() == one.tolist()
    two = torch.tensor([True, False, True, False])
    assert drop_tokens(experts_TK, affinity_TK, two, MINIATURE).keep_TK.all(1).tolist() == two.tolist()
    assert drop_tokens(experts_TK, affinity_TK, two, MINIATURE).dropped == 8
    every = torch.ones(4, dtype=torch.bool)
    assert drop_tokens(experts_TK, affinity_TK, every, MINIATURE).dropped == 0


def test_of_equal_affinities_the_later_slot_goes() -> None:
    experts_TK = torch.tensor([[0, 1, 2, 3]] * 2)
    keep_TK = drop_tokens(experts_TK, torch.ones(2, 4), nobody(experts_TK), MINIATURE).keep_TK
    assert keep_TK.tolist() == [[True, True, False, False], [False] * 4]


def test_tokens_in_another_order_give_the_mask_in_that_order() -> None:
    experts_TK, affinity_TK = routed(FULL, 300)
    protected_T = some(experts_TK, 0.1)
    assert affinity_TK.unique().numel() == affinity_TK.numel()
    keep_TK = drop_tokens(experts_TK, affinity_TK, protected_T, FULL).keep_TK
    order_T = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shuffled = drop_tokens(experts_TK[order_T], affinity_TK[order_T], protected_T[order_T], FULL)
    assert torch.equal(shuffled.keep_TK, keep_TK[order_T])


def test_scaled_affinities_drop_the_same() -> None:
    experts_TK, affinity_TK = routed(FULL, 300)
    once = drop_tokens(experts_TK, affinity_TK, nobody(experts_TK), FULL)
    scaled = drop_tokens(experts_TK, affinity_TK * 16, nobody(experts_TK), FULL)
    assert torch.equal(once.keep_TK, scaled.keep_TK)


def test_same_input_drops_the_same_and_no_generator_is_touched() -> None:
    experts_TK, affinity_TK = routed(FULL, 300)
    before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)
    first = drop_tokens(experts_TK, affinity_TK, nobody(experts_TK), FULL)
    second = drop_tokens(experts_TK, affinity_TK, nobody(experts_TK), FULL)
    protected_sequences(0, 0, 0, 100)
    assert torch.equal(first.keep_TK, second.keep_TK)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state(legacy=False)) == str(numpy_before)


def test_workers_that_drop_alone_stay_within_the_budget_of_all() -> None:
    experts_TK, affinity_TK = routed(FULL, 400)
    parts = [
        drop_tokens(experts, affinity, nobody(experts), FULL).keep_TK
        for experts, affinity in zip(experts_TK.chunk(4), affinity_TK.chunk(4), strict=True)
    ]
    assert group_loads(experts_TK, torch.cat(parts), FULL).max() <= group_budget(2400, 8, 1.0)


def test_one_group_has_nothing_to_drop() -> None:
    experts_TK, affinity_TK = routed(LITE, 100)
    dropped = drop_tokens(experts_TK, affinity_TK, nobody(experts_TK), LITE)
    assert dropped.keep_TK.all()
    assert (dropped.slots, dropped.dropped) == (600, 0)


def test_gradient_tracking_is_left_alone() -> None:
    experts_TK, affinity_TK = routed(FULL, 50)
    plain = drop_tokens(experts_TK, affinity_TK, nobody(experts_TK), FULL)
    tracked = drop_tokens(experts_TK, affinity_TK.requires_grad_(), nobody(experts_TK), FULL)
    assert torch.equal(plain.keep_TK, tracked.keep_TK)


@pytest.mark.parametrize("capacity", [0.0, -1.0, float("nan"), float("inf")])
def test_capacity_out_of_range_is_refused(capacity: float) -> None:
    experts_TK, affinity_TK = routed(FULL, 5)
    with pytest.raises(ValueError, match="capacity is"):
        drop_tokens(experts_TK, affinity_TK, nobody(experts_TK), FULL, capacity)


def test_shapes_that_disagree_are_refused() -> None:
    experts_TK, affinity_TK = routed(FULL, 5)
    with pytest.raises(ValueError, match=r"protected tokens \(4,\); expected"):
        drop_tokens(experts_TK, affinity_TK, nobody(experts_TK)[:4], FULL)
    with pytest.raises(ValueError, match=r"affinities \(5, 5\)"):
        drop_tokens(experts_TK, affinity_TK[:, :5], nobody(experts_TK), FULL)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_the_share_of_sequences_is_protected(share: float) -> None:
    """Within five standard deviations, over sequences, over steps and over seeds."""
    count = 20_000
    slack = 5 * math.sqrt(share * (1 - share) / count)
    over_sequences = protected_sequences(7, 3, 0, count, share)
    assert over_sequences.dtype == np.bool_
    assert abs(over_sequences.mean() - share) < slack
    choose: list[Callable[[int], bool]] = [
        lambda step: bool(protected_sequences(7, step, 5, 1, share)[0]),
        lambda seed: bool(protected_sequences(seed, 3, 5, 1, share)[0]),
    ]
    for pick in choose:
        assert abs(np.mean([pick(index) for index in range(2000)]) - share) < slack * math.sqrt(count / 2000)


def test_protection_does_not_depend_on_who_has_the_sequences() -> None:
    together = protected_sequences(1, 2, 10, 90)
    for cut in (1, 4, 37):
        parts = [protected_sequences(1, 2, 10, cut), protected_sequences(1, 2, 10 + cut, 90 - cut)]
        assert np.array_equal(np.concatenate(parts), together)


def test_other_seeds_and_steps_protect_others() -> None:
    first = protected_sequences(1, 2, 0, 500)
    assert np.array_equal(first, protected_sequences(1, 2, 0, 500))
    assert not np.array_equal(first, protected_sequences(1, 3, 0, 500))
    assert not np.array_equal(first, protected_sequences(2, 2, 0, 500))
    assert not np.array_equal(first, protected_sequences(2, 1, 0, 500))


def test_protection_is_the_same_on_every_machine() -> None:
    assert np.flatnonzero(protected_sequences(1, 2, 0, 40)).tolist() == [1, 17, 18, 23, 31]


def test_none_and_all_can_be_protected() -> None:
    assert not protected_sequences(1, 2, 0, 100, share=0.0).any()
    assert protected_sequences(1, 2, 0, 100, share=1.0).all()
    assert len(protected_sequences(1, 2, 0, 0)) == 0


@pytest.mark.parametrize("name", ["seed", "step", "first_sequence", "count"])
def test_negative_number_is_refused_by_name(name: str) -> None:
    given_numbers = {"seed": 1, "step": 2, "first_sequence": 0, "count": 3} | {name: -1}
    with pytest.raises(ValueError, match=f"{name} is -1"):
        protected_sequences(**given_numbers)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share is"):
        protected_sequences(1, 2, 0, 3, share)
