"""A host computes each pair's expert on its row, and refuses by name what it cannot."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.errors import HostRefused
from experts.host import ExpertHost
from experts.messages import ForwardRequest
from model.checkpoint import Checkpoint

HELD = [(1, expert) for expert in range(0, 16, 2)] + [(2, 5)]


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("tiny"))


@pytest.fixture(scope="module")
def host(opened: Checkpoint) -> ExpertHost:
    made = ExpertHost(opened.config, "host-0", 3)
    made.load(opened, HELD)
    return made


def ask(x_RD: torch.Tensor, rows: list[int], experts: list[int], layer: int = 1, generation: int = 3) -> ForwardRequest:
    return ForwardRequest(1, generation, layer, x_RD, torch.tensor(rows).int(), torch.tensor(experts).int())


def slow(opened: Checkpoint, layer: int, expert: int, x_D: torch.Tensor) -> torch.Tensor:
    """down(silu(gate x) * up x) in float64."""
    weights = opened.expert(layer, expert)
    x = x_D.double()
    gate = weights.gate_proj.double() @ x
    up = weights.up_proj.double() @ x
    return weights.down_proj.double() @ (gate / (1 + torch.exp(-gate)) * up)


def test_every_pair_gets_its_experts_output(opened: Checkpoint, host: ExpertHost) -> None:
    torch.manual_seed(0)
    x_RD = torch.randn(7, opened.config.hidden_size)
    rows = [0, 0, 3, 6, 2, 2, 5, 1, 4]
    experts = [0, 4, 4, 14, 2, 0, 8, 8, 8]
    y_PD = host.forward(ask(x_RD, rows, experts)).y_PD
    for y_D, row, expert in zip(y_PD, rows, experts, strict=True):
        assert torch.allclose(y_D.double(), slow(opened, 1, expert, x_RD[row]), atol=1e-5)


def test_a_rows_bits_do_not_depend_on_its_company(opened: Checkpoint, host: ExpertHost) -> None:
    torch.manual_seed(1)
    x_RD = torch.randn(40, opened.config.hidden_size)
    alone = [host.forward(ask(x_RD[row : row + 1], [0], [6])).y_PD[0] for row in range(40)]
    for count in (2, 3, 5, 16, 17, 33, 40):
        together = host.forward(ask(x_RD[:count], list(range(count)), [6] * count)).y_PD
        assert all(torch.equal(together[row], alone[row]) for row in range(count))


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"generation": 2}, "wrong_generation", "generation 3; the request was for 2"),
        ({"experts": [1]}, "not_held", r"does not hold experts \[1\] of layer 1"),
        ({"experts": [999]}, "not_held", r"\[999\]"),
        ({"experts": [-2]}, "not_held", r"\[-2\]"),
        ({"layer": 3}, "not_held", "layer 3"),
        ({"layer": 77}, "not_held", "layer 77"),
        ({"rows": [2]}, "bad_request", "outside the 2 rows"),
        ({"rows": [-1]}, "bad_request", "outside the 2 rows"),
        ({"rows": [], "experts": []}, "bad_request", "no experts"),
        ({"x_RD": torch.zeros(2, 8)}, "bad_request", "8 wide; expected 256"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    host: ExpertHost, change: dict[str, object], code: str, said: str
) -> None:
    good: dict[str, object] = {"x_RD": torch.zeros(2, 256), "rows": [1], "experts": [0]}
    with pytest.raises(HostRefused, match=said) as caught:
        host.forward(ask(**(good | change)))  # type: ignore[arg-type]
    assert caught.value.code == code


def test_it_holds_what_it_was_told_to_and_can_let_go(opened: Checkpoint) -> None:
    host = ExpertHost(opened.config, "host-0", 1)
    seen: list[tuple[int, int]] = []
    host.load(opened, HELD, lambda done, total: seen.append((done, total)))
    assert sorted(host.held) == sorted(HELD)
    assert seen == [(done, len(HELD)) for done in range(1, len(HELD) + 1)]
    weights = 3 * opened.config.hidden_size * opened.config.moe_intermediate_size
    assert host.stats().nbytes == len(HELD) * weights * 4
    host.unload([(1, 0), (2, 5)])
    assert (1, 0) not in host.held
    with pytest.raises(HostRefused, match=r"\[0\]"):
        host.forward(ask(torch.zeros(1, 256), [0], [0], generation=1))


def test_a_dense_layer_has_no_experts_to_load(opened: Checkpoint) -> None:
    with pytest.raises(ValueError, match="layer 0 has no routed experts"):
        ExpertHost(opened.config, "host-0", 1).load(opened, [(0, 0)])
