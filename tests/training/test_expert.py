"""One expert's hand-written gradients are autograd's; contributions count once, in one order, however they come."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from experts.training.adamw import AdamW, Trained, step_parameters
from experts.training.expert import Contribution, TrainedExpert
from experts.training.ledger import StepLedger
from experts.training.spec import ExpertTraining, LowRank
from experts.training.store import rows_by_expert

ROWS, HIDDEN, WIDTH = 7, 12, 10


def make(training: ExpertTraining) -> TrainedExpert:
    generator = torch.Generator().manual_seed(5)
    expert = TrainedExpert(
        torch.randn(2 * WIDTH, HIDDEN, generator=generator) * 0.3, torch.randn(HIDDEN, WIDTH, generator=generator) * 0.3
    )
    expert.configure((1, 3), training)
    for name, trained in expert.parameters.items():
        if name.endswith("lora_B"):  # zero would hide A's gradient
            trained.value.normal_(std=0.2, generator=generator)
    return expert


def autograd(expert: TrainedExpert, x: Tensor, dout: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, ...]:
    """dx, dweight and the gradient of every parameter, by torch in float64."""
    values = {name: trained.value.double().requires_grad_() for name, trained in expert.parameters.items()}
    base = {"gate_up_proj": expert.gate_up.double(), "down_proj": expert.down.double()} | values
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()

    def linear(name: str, given: Tensor) -> Tensor:
        out = F.linear(given, base[name])
        if f"{name}.lora_A" in values:
            out = out + scale * F.linear(F.linear(given, values[f"{name}.lora_A"]), values[f"{name}.lora_B"])
        return out

    gate, up = linear("gate_up_proj", x).chunk(2, dim=-1)
    out = weight[:, None] * linear("down_proj", F.silu(gate) * up)
    return torch.autograd.grad(out, [x, weight, *values.values()], dout.double())


@pytest.mark.parametrize("lora", [None, LowRank(3, 6.0)])
def test_gradients_are_autograds(lora: LowRank | None) -> None:
    expert = make(ExpertTraining("run", lora=lora))
    x, dout, weight = torch.randn(ROWS, HIDDEN), torch.randn(ROWS, HIDDEN), torch.rand(ROWS)
    wanted = autograd(expert, x, dout, weight, lora.scale if lora else 0.0)
    parts = [expert.backward(x[rows], dout[rows], weight[rows]) for rows in (slice(0, 4), slice(4, None))]
    for _, _, gained in parts:
        expert.accumulate(gained)
    found = [torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])]
    found += [trained.grad for trained in expert.parameters.values() if trained.grad is not None]
    assert len(found) == len(wanted) == (6 if lora else 4)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5, rtol=1e-5)


def test_what_forward_computed_is_kept_for_the_same_rows_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    expert = make(ExpertTraining("run"))
    computed: list[Tensor] = []
    gate_up = TrainedExpert._gate_up

    def count(this: TrainedExpert, x_ND: Tensor) -> Tensor:
        computed.append(x_ND)
        return gate_up(this, x_ND)

    monkeypatch.setattr(TrainedExpert, "_gate_up", count)
    rows = [torch.randn(ROWS, HIDDEN) for _ in range(3)]
    dout, weight = torch.randn(ROWS, HIDDEN), torch.rand(ROWS)
    expert.begin(2)
    for x in rows:
        expert.forward(x)  # the first is dropped for the third
    kept = [expert.backward(x.clone(), dout, weight)[0] for x in (rows[2], rows[1])]
    assert len(computed) == 3
    again = [expert.backward(x, dout, weight)[0] for x in (rows[2], rows[1], rows[0])]
    assert len(computed) == 6
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=False))
    expert.forward(rows[0])
    expert.begin(0)
    expert.forward(rows[0])
    expert.backward(rows[0], dout, weight)
    assert len(computed) == 9


def test_bf16_experts_compute_with_rounded_weights_and_step_whole_ones() -> None:
    expert = make(ExpertTraining("run", dtype="bfloat16"))
    x = torch.randn(ROWS, HIDDEN)
    gate, up = F.linear(x, expert.gate_up.bfloat16().float()).chunk(2, dim=-1)
    assert torch.allclose(expert.forward(x), F.linear(F.silu(gate) * up, expert.down.bfloat16().float()), atol=1e-5)
    before = expert.gate_up.clone()
    _, _, gained = expert.backward(x, torch.randn(ROWS, HIDDEN), torch.rand(ROWS))
    expert.accumulate(gained)
    step_parameters(list(expert.parameters.values()), AdamW(), 1e-6, 1.0, 0)
    expert.stepped()
    assert not torch.equal(expert.gate_up, before)
    assert not torch.equal(expert.gate_up, expert.gate_up.bfloat16().float())


def test_an_expert_that_is_not_trained_gains_nothing() -> None:
    expert = make(ExpertTraining("run", only=((1, 4),)))
    dx, _, gained = expert.backward(torch.randn(ROWS, HIDDEN), torch.randn(ROWS, HIDDEN), torch.rand(ROWS))
    expert.accumulate(gained)
    assert dx.abs().sum() > 0
    assert expert.parameters == {}


def test_the_first_factors_are_the_seeds_and_the_pairs() -> None:
    def first(seed: int, pair: tuple[int, int]) -> Tensor:
        expert = TrainedExpert(torch.zeros(2 * WIDTH, HIDDEN), torch.zeros(HIDDEN, WIDTH))
        expert.configure(pair, ExpertTraining("run", seed=seed, lora=LowRank(3, 6.0)))
        return expert.parameters["gate_up_proj.lora_A"].value

    assert torch.equal(first(1, (2, 3)), first(1, (2, 3)))
    different = [first(1, (2, 3)), first(2, (2, 3)), first(1, (3, 2)), first(1, (2, 4))]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(different, 2))


def test_a_state_of_another_shape_or_method_is_refused() -> None:
    expert = make(ExpertTraining("run"))
    other = make(ExpertTraining("run", lora=LowRank(3, 6.0)))
    with pytest.raises(ValueError, match=r"down_proj.lora_A is .*another way of training"):
        expert.restore(other.state(), 1)
    wrong = expert.state() | {"down_proj": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"down_proj is \(3, 3\); expected \(12, 10\)"):
        expert.restore(wrong, 1)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_contributions_are_applied_once_in_one_order(order: tuple[int, ...]) -> None:
    ledger = StepLedger(0, micros=2, ranks=2)
    applied: list[tuple[int, object]] = []
    things = [Contribution(*(torch.tensor([float(turn)]),) * 4) for turn in range(4)]
    for turn in order:
        assert ledger.missing([1]) != []
        for first in (True, False):
            assert ledger.add(1, turn, {0: things[turn]}) is first
            ledger.settle(lambda layer, gains: applied.append((layer, gains[0])))
    assert applied == [(1, thing) for thing in things]
    assert ledger.missing([1]) == []
    assert ledger.missing([1, 2]) == [(2, 0, 0)]
    with pytest.raises(ValueError, match="micro-batch 2 of worker 0; step 0 has 2 on 2"):
        ledger.turn(2, 0)


def test_rows_are_grouped_by_expert_in_their_order() -> None:
    groups = rows_by_expert(torch.tensor([5, 2, 5, 9, 2], dtype=torch.int32))
    assert [(expert, places.tolist()) for expert, places in groups] == [(2, [1, 4]), (5, [0, 2]), (9, [3])]
    assert rows_by_expert(torch.empty(0, dtype=torch.int32)) == []


def test_steps_are_torchs() -> None:
    values = [torch.randn(4, 3), torch.randn(5)]
    mine = [Trained(values[0].clone()), Trained(values[1].clone(), decays=False)]
    theirs = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    for step in range(3):
        for trained, parameter in zip(mine, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            trained.grad = 2 * parameter.grad
        optimizer.step()
        step_parameters(mine, AdamW(weight_decay=0.1), 0.01, 0.5, step)
    for trained, parameter in zip(mine, theirs, strict=True):
        assert torch.allclose(trained.value, parameter, atol=1e-6)


@pytest.mark.parametrize("field", ["run_id", "dtype"])
def test_a_training_that_makes_no_sense_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ExpertTraining(**({"run_id": "run"} | {field: ""}))
    training = ExpertTraining("a", only=((1, 2),), lora=LowRank(2, 4.0))
    assert ExpertTraining.from_json(training.to_json()) == training
