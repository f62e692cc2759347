"""The balance losses against plain loops written from the paper's formulas, their invariants and their gradients."""

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig, parse_config
from router.gate import route
from router.load import LoadMeter
from router.losses import BalanceCoefficients, BalanceLosses, balance_losses, gate_scores, load_imbalance
from tests.model.shapes import V2, V2_LITE

FULL, LITE = parse_config(V2), parse_config(V2_LITE)
MINIATURE = replace(FULL, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
TRAINED = BalanceCoefficients(expert=0.003, device=0.05, communication=0.02)
ONES = BalanceCoefficients(expert=1.0, device=1.0, communication=1.0)
KINDS = ("expert", "device", "communication")


def by_loops(
    scores: list[list[float]], chosen: list[list[int]], ends: list[int], config: ModelConfig
) -> dict[str, float]:
    """Σ over the sequences of Σ f P, of each kind, term by term from equations 23 to 31."""
    totals = dict.fromkeys(KINDS, 0.0)
    big_e, big_k, big_d, big_m = (
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
    )
    for start, end in pairwise([0, *ends]):
        big_t = end - start
        sequence = range(start, end)
        f, p = [], []
        for expert in range(big_e):
            f.append(big_e / (big_k * big_t) * sum(1 for t in sequence if expert in chosen[t]))
            p.append(sum(scores[t][expert] for t in sequence) / big_t)
        totals["expert"] += sum(f[i] * p[i] for i in range(big_e))
        for device in range(big_d):
            members = [i for i in range(big_e) if i * big_d // big_e == device]
            p_device = sum(p[i] for i in members)
            totals["device"] += sum(f[i] for i in members) / len(members) * p_device
            sent = sum(1 for t in sequence if any(i in members for i in chosen[t]))
            totals["communication"] += big_d / (big_m * big_t) * sent * p_device
    return totals


def routed(config: ModelConfig, tokens: int, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Scores and chosen experts of random tokens that all prefer some experts."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, config.n_routed_experts, generator=generator) * spread
    logits_TE += torch.randn(config.n_routed_experts, generator=generator) * spread
    return gate_scores(logits_TE), route(logits_TE, config).experts_TK


def numbers(losses: BalanceLosses) -> dict[str, float]:
    return {kind: float(getattr(losses, kind)) for kind in KINDS}


def f_of(kind: str, scores_TE: Tensor, experts_TK: Tensor, config: ModelConfig) -> Tensor:
    """What a loss of one sequence multiplies each expert's mean score with, read from its gradient."""
    scores_TE = scores_TE.clone().requires_grad_()
    losses = balance_losses(scores_TE, experts_TK, [len(scores_TE)], config, ONES)
    (grad_TE,) = torch.autograd.grad(getattr(losses, kind), scores_TE)
    torch.testing.assert_close(grad_TE, grad_TE[:1].expand_as(grad_TE))
    return grad_TE.sum(0)


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.integers(2, 5))
    size = draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(6, kept * size)))
    return replace(FULL, n_routed_experts=groups * size, n_group=groups, topk_group=kept, num_experts_per_tok=top_k)


@settings(max_examples=60)
@given(config=shapes(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_losses_are_those_of_the_formulas(config: ModelConfig, lengths: list[int], seed: int) -> None:
    ends = list(accumulate(lengths))
    scores_TE, experts_TK = routed(config, ends[-1], seed)
    ours = balance_losses(scores_TE, experts_TK, ends, config, ONES)
    theirs = by_loops(scores_TE.tolist(), experts_TK.tolist(), ends, config)
    assert numbers(ours) == pytest.approx(theirs, rel=1e-5)
    assert ours.sequences == len(lengths)
    assert float(ours.total) == pytest.approx(sum(theirs.values()), rel=1e-5)


def test_each_loss_is_times_its_coefficient() -> None:
    scores_TE, experts_TK = routed(FULL, 60)
    plain = numbers(balance_losses(scores_TE, experts_TK, [25, 60], FULL, ONES))
    scaled = numbers(balance_losses(scores_TE, experts_TK, [25, 60], FULL, TRAINED))
    assert scaled == pytest.approx({kind: getattr(TRAINED, kind) * plain[kind] for kind in KINDS})


@pytest.mark.parametrize("name", ["full", "miniature"])
@pytest.mark.parametrize("spread", [0.1, 2.0, 10.0])
def test_f_sums_to_the_experts_and_to_the_devices(name: str, spread: float) -> None:
    """Σ f = E, Σ f' = D, and Σ f'' is D times the share of M devices that a token reaches."""
    config = {"full": FULL, "miniature": MINIATURE}[name]
    scores_TE, experts_TK = routed(config, 50, spread=spread)
    size = config.n_routed_experts // config.n_group
    f_E = {kind: f_of(kind, scores_TE, experts_TK, config) for kind in KINDS}
    assert float(f_E["expert"].sum()) == pytest.approx(config.n_routed_experts)
    assert float(f_E["device"][::size].sum()) == pytest.approx(config.n_group)
    fan_out = sum(len({expert // size for expert in row}) for row in experts_TK.tolist()) / 50
    assert fan_out <= config.topk_group
    assert float(f_E["communication"][::size].sum()) == pytest.approx(config.n_group * fan_out / config.topk_group)


def test_perfect_balance_gives_the_coefficients() -> None:
    """Each token takes two experts from each of two neighbouring devices; all experts are taken equally often."""
    experts_TK = torch.tensor(
        [
            [4 * device + pair, 4 * device + pair + 1, 4 * other + pair, 4 * other + pair + 1]
            for device, other in ((0, 1), (1, 2), (2, 3), (3, 0))
            for pair in (0, 2)
        ]
    )
    even_TE = torch.full((16, 16), 1 / 16)
    both_TK = torch.cat([experts_TK, experts_TK.flip(0)])
    losses = balance_losses(even_TE, both_TK, [8, 16], MINIATURE, TRAINED)
    assert {kind: value / losses.sequences for kind, value in numbers(losses).items()} == pytest.approx(
        {kind: getattr(TRAINED, kind) for kind in KINDS}, rel=1e-7
    )


def test_collapse_costs_more_than_balance() -> None:
    scores_TE = torch.full((8, 16), 1e-9)
    scores_TE[:, :4] = 0.25
    experts_TK = torch.tensor([[0, 1, 2, 3]] * 8)
    losses = numbers(balance_losses(scores_TE, experts_TK, [8], MINIATURE, ONES))
    assert losses == pytest.approx({"expert": 4.0, "device": 4.0, "communication": 2.0}, rel=1e-6)


def test_sums_do_not_depend_on_what_is_computed_together() -> None:
    lengths = [5, 1, 9, 3, 12]
    ends = list(accumulate(lengths))
    scores_TE, experts_TK = routed(FULL, ends[-1])
    together = balance_losses(scores_TE, experts_TK, ends, FULL, TRAINED)
    for cuts in ([2], [1, 2, 3, 4], [1, 4]):
        total = dict.fromkeys(KINDS, 0.0)
        sequences = 0
        for first, last in pairwise([0, *cuts, len(lengths)]):
            start = sum(lengths[:first])
            part = balance_losses(
                scores_TE[start : ends[last - 1]],
                experts_TK[start : ends[last - 1]],
                list(accumulate(lengths[first:last])),
                FULL,
                TRAINED,
            )
            total = {kind: total[kind] + value for kind, value in numbers(part).items()}
            sequences += part.sequences
        assert total == pytest.approx(numbers(together), rel=1e-5)
        assert sequences == together.sequences == len(lengths)


def test_a_long_sequence_weighs_as_much_as_a_short_one() -> None:
    """The same routing, repeated, is the same loss."""
    scores_TE, experts_TK = routed(MINIATURE, 6)
    once = balance_losses(scores_TE, experts_TK, [6], MINIATURE, TRAINED)
    thrice = balance_losses(scores_TE.repeat(3, 1), experts_TK.repeat(3, 1), [18], MINIATURE, TRAINED)
    assert numbers(thrice) == pytest.approx(numbers(once), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_mean_scores_is_the_finite_difference(kind: str) -> None:
    scores_TE, experts_TK = routed(MINIATURE, 7)
    scores_TE = scores_TE.double().requires_grad_()

    def loss(scores_TE: Tensor) -> Tensor:
        value = getattr(balance_losses(scores_TE, experts_TK, [3, 7], MINIATURE, ONES), kind)
        assert isinstance(value, Tensor)
        return value

    assert torch.autograd.gradcheck(loss, (scores_TE,))


def test_gradient_reaches_the_logits_through_the_softmax_alone() -> None:
    """d/dlogits of Σ f P with f fixed: s_i (f_i - Σ_j f_j s_j) / T."""
    config = replace(MINIATURE, topk_group=MINIATURE.n_group)
    logits_TE = torch.randn(9, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
    experts_TK = route(logits_TE.detach(), config).experts_TK
    scores_TE = gate_scores(logits_TE)
    balance_losses(scores_TE, experts_TK, [9], config, BalanceCoefficients(expert=1.0)).total.backward()
    f_E = torch.tensor([float((experts_TK == expert).sum()) * 16 / (4 * 9) for expert in range(16)])
    score_TE = scores_TE.detach()
    expected_TE = score_TE * (f_E - (score_TE @ f_E)[:, None]) / 9
    assert logits_TE.grad is not None
    torch.testing.assert_close(logits_TE.grad, expected_TE)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_carry_no_gradient(kind: str) -> None:
    """With f fixed the loss is linear in the scores: the gradient is the same at others, and times them the loss."""
    scores_TE, experts_TK = routed(MINIATURE, 8)
    f_E = f_of(kind, scores_TE, experts_TK, MINIATURE)
    torch.testing.assert_close(f_of(kind, routed(MINIATURE, 8, seed=1)[0], experts_TK, MINIATURE), f_E)
    loss = numbers(balance_losses(scores_TE, experts_TK, [8], MINIATURE, ONES))[kind]
    assert float(f_E @ scores_TE.mean(0)) == pytest.approx(loss, rel=1e-6)


def test_step_along_the_gradient_evens_the_load() -> None:
    logits_TE = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    bias_E = torch.linspace(1.0, -1.0, 16).requires_grad_()
    before = after = 0.0
    for _ in range(60):
        scores_TE = gate_scores(logits_TE + bias_E)
        experts_TK = route((logits_TE + bias_E).detach(), MINIATURE).experts_TK
        rows = torch.bincount(experts_TK.flatten(), minlength=16).tolist()
        after = load_imbalance(rows, MINIATURE).expert
        before = before or after
        losses = balance_losses(scores_TE, experts_TK, [100, 200, 300, 400], MINIATURE, ONES)
        (grad_E,) = torch.autograd.grad(losses.total / losses.sequences, bias_E)
        with torch.no_grad():
            bias_E -= 0.3 * grad_E
    assert before > 2.0
    assert after < 1.5


def test_micro_batch_without_tokens_adds_nothing() -> None:
    losses = balance_losses(torch.zeros(0, 16), torch.zeros(0, 4, dtype=torch.int64), [], MINIATURE, TRAINED)
    assert float(losses.total) == 0.0
    assert losses.sequences == 0


def test_lite_has_the_expert_loss_alone() -> None:
    scores_TE, experts_TK = routed(LITE, 20)
    losses = balance_losses(scores_TE, experts_TK, [20], LITE, BalanceCoefficients(expert=0.001))
    assert float(losses.total) == float(losses.expert) > 0


@pytest.mark.parametrize("name", ["device", "communication"])
def test_coefficient_between_devices_is_refused_by_name_where_there_is_one(name: str) -> None:
    coefficients = BalanceCoefficients(**{name: 0.05})
    coefficients.check(FULL)
    with pytest.raises(ValueError, match=f"coefficient {name} is 0.05.*n_group is 1"):
        coefficients.check(LITE)
    scores_TE, experts_TK = routed(LITE, 4)
    with pytest.raises(ValueError, match=f"coefficient {name} is"):
        balance_losses(scores_TE, experts_TK, [4], LITE, coefficients)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", KINDS)
def test_coefficient_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"coefficient {name} is"):
        BalanceCoefficients(**{name: value})


@pytest.mark.parametrize("ends", [[], [7], [9], [4, 4, 8], [5, 3, 8], [0, 8]])
def test_ends_that_do_not_rise_to_the_tokens_are_refused(ends: list[int]) -> None:
    scores_TE, experts_TK = routed(MINIATURE, 8)
    with pytest.raises(ValueError, match="segment_ends is"):
        balance_losses(scores_TE, experts_TK, ends, MINIATURE, TRAINED)


def test_scores_below_fp32_are_refused() -> None:
    scores_TE, experts_TK = routed(MINIATURE, 8)
    with pytest.raises(ValueError, match="bfloat16; expected float32"):
        balance_losses(scores_TE.bfloat16(), experts_TK, [8], MINIATURE, TRAINED)
    with pytest.raises(ValueError, match="bfloat16; expected float32"):
        gate_scores(scores_TE.bfloat16())


def test_imbalance_is_the_largest_load_over_the_mean() -> None:
    config = replace(MINIATURE, n_routed_experts=8, n_group=2, num_experts_per_tok=2)
    uneven = load_imbalance([8, 0, 0, 0, 2, 2, 2, 2], config)
    assert (uneven.expert, uneven.device) == (4.0, 1.0)
    lopsided = load_imbalance([3, 3, 3, 3, 1, 1, 1, 1], config)
    assert (lopsided.expert, lopsided.device) == (1.5, 1.5)
    for even in ([5] * 8, [0] * 8):
        assert load_imbalance(even, config) == load_imbalance([1] * 8, config)
    assert load_imbalance([0] * 8, config).expert == 1.0


def test_imbalance_is_of_what_a_meter_counted() -> None:
    _, experts_TK = routed(LITE, 100)
    meter = LoadMeter([3], LITE.n_routed_experts)
    meter.count(3, experts_TK[:40])
    meter.count(3, experts_TK[40:])
    flat = experts_TK.flatten().tolist()
    busiest = max(flat.count(expert) for expert in range(64))
    assert load_imbalance(meter.take()[3], LITE).expert == pytest.approx(busiest / (600 / 64))
    assert load_imbalance([1] * 64, LITE).device == 1.0
