"""What the recipe adds to the loss: balance, which does not depend on who computes what, and slots that are dropped."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention.training.decoder import ForwardOptions
from attention.training.parameters import DenseParameters
from experts.training.function import routed_experts
from router.gate import Routing
from router.losses import BalanceCoefficients
from tests.training.rig import make_rig, plans, samples
from tests.training.test_steps import same, train, weights

BALANCE = ForwardOptions(balance=BalanceCoefficients(0.003, 0.05, 0.02))


def test_balance_losses_are_the_same_however_the_step_is_divided(checkpoint: Callable[[str], Path]) -> None:
    parts = [samples(512, (19, 11), 1), samples(512, (14, 16), 2)]
    together = samples(512, (19, 11), 1)
    rigs = [make_rig(checkpoint("mini"), 2, workers=workers, options=BALANCE) for workers in (1, 2)]
    one = rigs[0].step(plans(0, [parts]))[0]
    two = rigs[1].step(plans(0, [[parts[0]], [parts[1]]]))[0]
    assert one.balance > 0.02  # perfect balance has the three coefficients a layer
    assert two.balance == pytest.approx(one.balance, rel=1e-6)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    plain = make_rig(checkpoint("mini"), 2).step(plans(0, [[together]]))[0]
    assert plain.balance == 0.0


def test_balance_losses_even_the_load(checkpoint: Callable[[str], Path]) -> None:
    """Only the gates are trained, and only by balance: the loss is near what perfect balance has."""
    strong = ForwardOptions(balance=BalanceCoefficients(3.0, 0.0, 0.0))
    rig = make_rig(
        checkpoint("mini"),
        2,
        options=strong,
        make_dense=lambda opened: DenseParameters.load(opened, lambda name: name.endswith("mlp.gate.weight")),
    )
    reports = [rig.step(plans(step, [[samples(512, (60,), 1)]], 1e-2))[0] for step in range(12)]
    assert reports[-1].balance < reports[0].balance
    assert reports[-1].balance >= 3.0 * 2 * 0.99  # α1 a layer


def test_a_dropped_slot_counts_for_nothing(checkpoint: Callable[[str], Path]) -> None:
    """As if its weight were 0, to the bit, and the hosts are not asked for it."""
    rig = make_rig(checkpoint("mini"), 2)
    coordinator = rig.workers[0]._coordinator
    assert coordinator is not None
    client, placement = rig.clients[0], rig.table.placement
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(9, 64, generator=generator)
    experts_TK = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(9)])
    keep_TK = torch.rand(9, 4, generator=generator) > 0.3
    dout_TD = torch.randn(9, 64, generator=generator)
    found = []
    for keep in (keep_TK, None):
        coordinator.restart(placement)
        coordinator.begin(placement, 0, 1, 1)
        client.begin(0, placement)
        x, weights_TK = x_TD.clone().requires_grad_(), torch.full((9, 4), 0.25, requires_grad=True)
        routing = Routing(experts_TK, weights_TK * keep_TK)
        dispatch = client.start(1, x.detach(), routing)
        out = routed_experts(client, dispatch, x, routing, 1, 0, keep)
        out.backward(dout_TD)
        found.append((out.detach(), x.grad, weights_TK.grad, rig.expert_gradients()))
    (out, dx, dweights, grads), (other_out, other_dx, other_dweights, other_grads) = found
    assert dx is not None
    assert dweights is not None
    assert other_dx is not None
    assert torch.equal(out, other_out)
    assert torch.allclose(dx, other_dx, atol=1e-6)
    assert torch.allclose(dweights, other_dweights, atol=1e-6)
    assert (dweights[~keep_TK] == 0).all()
    assert all(torch.allclose(grads[name], other_grads[name], atol=1e-6) for name in grads)


def test_dropping_changes_no_bit_of_who_holds_what(checkpoint: Callable[[str], Path]) -> None:
    options = ForwardOptions(drop=True)
    rigs = [make_rig(checkpoint("mini"), hosts, replicas, options=options) for hosts, replicas in ((1, 1), (3, 2))]
    losses = [train(rig, 3) for rig in rigs]
    assert losses[0] == losses[1]
    assert same(weights(rigs[0]), weights(rigs[1]))
    report = rigs[0].step(plans(3, [[samples(512, (30, 30), 4)]]))[0]
    assert 0 < report.dropped < report.slots
    assert losses[0][0] != train(make_rig(checkpoint("mini"), 1), 1)[0]  # in the forward already


def test_bf16_rounds_what_is_computed_with_and_steps_whole_numbers() -> None:
    tensor = torch.tensor([[1.0001, -2.00003]])
    dense = DenseParameters({"a.weight": tensor}, lambda name: True, dtype="bfloat16")
    assert torch.equal(dense["a.weight"], tensor.bfloat16().float())
    dense.linear("a", torch.tensor([[3.0, 4.0]])).sum().backward()
    dense.take_gradients()
    assert dense.trained["a.weight"].grad is not None
    assert dense.trained["a.weight"].grad.tolist() == [[3.0, 4.0]]
    assert dense.trained["a.weight"].value.tolist() == tensor.tolist()
