"""The gate against plain loops over floats and against transformers, for greedy and device-limited routing."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from model.config import ModelConfig, parse_config
from router.gate import route
from tests.model.shapes import V2, V2_LITE

GroupScore = Callable[[list[float]], float]
Chosen = list[tuple[int, float]]

FULL, LITE = parse_config(V2), parse_config(V2_LITE)
MINIATURE = replace(FULL, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
CONFIGS = {"v2": FULL, "lite": LITE, "miniature": MINIATURE}


def sum_of_two_best(scores: list[float]) -> float:
    """DeepSeek-V3's group score, wrong for V2."""
    return sum(sorted(scores)[-2:])


def slow_route(logits: list[float], config: ModelConfig, group_score: GroupScore = max) -> Chosen:
    """Experts and weights of one token, best first; ties to the lower index."""
    peak = max(logits)
    exponentials = [math.exp(logit - peak) for logit in logits]
    scores = [value / math.fsum(exponentials) for value in exponentials]
    if config.topk_method == "group_limited_greedy":
        size = config.n_routed_experts // config.n_group
        groups = [scores[start : start + size] for start in range(0, len(scores), size)]
        ranking = sorted(range(config.n_group), key=lambda group: -group_score(groups[group]))
        kept = set(ranking[: config.topk_group])
        scores = [score if expert // size in kept else 0.0 for expert, score in enumerate(scores)]
    best = sorted(range(len(scores)), key=lambda expert: -scores[expert])[: config.num_experts_per_tok]
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        total = sum(scores[expert] for expert in best)
        return [(expert, scores[expert] / total) for expert in best]
    return [(expert, scores[expert] * config.routed_scaling_factor) for expert in best]


def random_logits(config: ModelConfig, tokens: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(tokens, config.n_routed_experts, generator=torch.Generator().manual_seed(seed)) * spread


def disagreements(logits_TE: Tensor, config: ModelConfig, group_score: GroupScore = max) -> int:
    """Tokens that our gate sends elsewhere, or with other weights, than the loops do."""
    routing = route(logits_TE, config)
    count = 0
    for logits, experts, weights in zip(
        logits_TE.tolist(), routing.experts_TK.tolist(), routing.weights_TK.tolist(), strict=True
    ):
        wanted = slow_route(logits, config, group_score)
        same_experts = experts == [expert for expert, _ in wanted]
        same_weights = weights == pytest.approx([weight for _, weight in wanted], rel=1e-5)
        count += not (same_experts and same_weights)
    return count


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("spread", [0.1, 2.0, 10.0])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_experts_and_weights_are_those_of_the_loops(name: str, spread: float, normalised: bool) -> None:
    config = replace(CONFIGS[name], norm_topk_prob=normalised)
    assert disagreements(random_logits(config, 200, spread=spread), config) == 0


@pytest.mark.parametrize("name", ["v2", "lite"])
def test_experts_and_weights_are_transformers(name: str) -> None:
    config, raw = CONFIGS[name], V2 if name == "v2" else V2_LITE
    theirs = DeepseekV2TopkRouter(DeepseekV2Config(**raw))
    theirs.hidden_dim = config.n_routed_experts
    theirs.weight = torch.nn.Parameter(torch.eye(config.n_routed_experts))
    logits_TE = random_logits(config, 300)
    _, weights_TK, experts_TK = theirs(logits_TE)
    order = weights_TK.argsort(dim=-1, descending=True)
    routing = route(logits_TE, config)
    assert torch.equal(routing.experts_TK, experts_TK.gather(1, order))
    torch.testing.assert_close(routing.weights_TK, weights_TK.gather(1, order), rtol=1e-6, atol=0)


def test_group_with_the_single_best_expert_wins_over_the_best_pair() -> None:
    """One group has the best expert, the other the better pair: V2 keeps the first, V3's score the second."""
    config = replace(MINIATURE, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2)
    logits = [3.0, -3.0, -3.1, -3.2, 2.9, 2.8, 2.7, 2.6]
    assert route(torch.tensor([logits]), config).experts_TK.tolist() == [[0, 1]]
    assert [expert for expert, _ in slow_route(logits, config, max)] == [0, 1]
    assert [expert for expert, _ in slow_route(logits, config, sum_of_two_best)] == [4, 5]


@pytest.mark.parametrize("name", ["v2", "miniature"])
def test_gate_with_v3s_group_score_would_be_caught(name: str) -> None:
    logits_TE = random_logits(CONFIGS[name], 200)
    assert disagreements(logits_TE, CONFIGS[name], max) == 0
    assert disagreements(logits_TE, CONFIGS[name], sum_of_two_best) > 20


@pytest.mark.parametrize("name", ["v2", "miniature"])
def test_token_reaches_at_most_topk_group_groups(name: str) -> None:
    config = CONFIGS[name]
    groups_TK = route(random_logits(config, 500), config).experts_TK // (config.n_routed_experts // config.n_group)
    fan_out = [len(set(groups)) for groups in groups_TK.tolist()]
    assert max(fan_out) == config.topk_group
    greedy = route(random_logits(config, 500), replace(config, topk_method="greedy")).experts_TK
    unlimited = [len(set(experts)) for experts in (greedy // (config.n_routed_experts // config.n_group)).tolist()]
    assert max(unlimited) > config.topk_group


def test_weights_are_affinities_over_all_experts_scaled_and_not_renormalised() -> None:
    logits_TE = random_logits(FULL, 50)
    routing = route(logits_TE, FULL)
    affinities_TK = torch.softmax(logits_TE, -1).gather(1, routing.experts_TK)
    assert FULL.routed_scaling_factor == 16.0
    assert torch.allclose(routing.weights_TK, affinities_TK * 16.0, rtol=1e-6, atol=0)
    assert (routing.weights_TK.sum(-1) < 15.0).any()


def test_normalised_weights_sum_to_one_and_are_not_scaled() -> None:
    weights_TK = route(random_logits(FULL, 50), replace(FULL, norm_topk_prob=True)).weights_TK
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(50))


def test_single_expert_is_scaled_even_where_normalising_is_asked() -> None:
    """As released: a single chosen affinity would normalise to one whatever it is."""
    config = replace(FULL, num_experts_per_tok=1)
    logits_TE = random_logits(config, 50)
    normalised = route(logits_TE, replace(config, norm_topk_prob=True)).weights_TK
    assert torch.equal(normalised, route(logits_TE, config).weights_TK)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_slots_are_distinct_and_fall_in_affinity(name: str) -> None:
    routing = route(random_logits(CONFIGS[name], 200), CONFIGS[name])
    assert all(len(set(experts)) == len(experts) for experts in routing.experts_TK.tolist())
    assert (routing.weights_TK.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_equal_affinities_go_to_the_lower_index(name: str) -> None:
    config = CONFIGS[name]
    logits_TE = torch.zeros(3, config.n_routed_experts)
    assert route(logits_TE, config).experts_TK.tolist() == [list(range(config.num_experts_per_tok))] * 3


def test_equal_groups_and_experts_in_part_go_to_the_lower_index() -> None:
    """Groups 1, 2 and 3 tie for the two places; within them the experts tie too."""
    logits = [0.0] * 4 + [1.0, 2.0, 2.0, 1.0] * 3
    routing = route(torch.tensor([logits]), MINIATURE)
    assert routing.experts_TK.tolist() == [[5, 6, 9, 10]]
    assert [expert for expert, _ in slow_route(logits, MINIATURE)] == [5, 6, 9, 10]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    config = CONFIGS[name]
    logits_TE = random_logits(config, 131)
    whole = route(logits_TE, config)
    for start, end in [(0, 1), (1, 2), (0, 3), (5, 21), (64, 131), *((row, row + 1) for row in range(100, 131))]:
        part = route(logits_TE[start:end].clone(), config)
        assert torch.equal(part.experts_TK, whole.experts_TK[start:end])
        assert torch.equal(part.weights_TK, whole.weights_TK[start:end])
    shuffled = torch.randperm(131, generator=torch.Generator().manual_seed(1))
    assert torch.equal(route(logits_TE[shuffled], config).weights_TK, whole.weights_TK[shuffled])


def test_no_tokens_give_no_rows() -> None:
    routing = route(torch.empty(0, 160), FULL)
    assert routing.experts_TK.shape == routing.weights_TK.shape == (0, 6)
    assert routing.experts_TK.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_that_are_not_fp32_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"gate logits are {dtype}; expected float32"):
        route(random_logits(FULL, 2).to(dtype), FULL)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_gradient_reaches_every_logit_of_a_token(name: str) -> None:
    """The softmax spans all experts, so also those not chosen are pushed; those of dropped groups too."""
    logits_TE = random_logits(CONFIGS[name], 4).requires_grad_()
    route(logits_TE, CONFIGS[name]).weights_TK.sum().backward()
    assert logits_TE.grad is not None
    assert (logits_TE.grad != 0).all()
