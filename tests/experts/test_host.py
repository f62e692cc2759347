"""A host computes each pair's expert on its row, and refuses by name what it cannot."""

import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.errors import HostRefused
from experts.host import ExpertHost
from experts.messages import ForwardRequest
from kernels.experts import PackedExperts
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


def test_what_it_computes_with_is_what_was_on_disk(opened: Checkpoint, host: ExpertHost) -> None:
    weights, read = host.weights(2, 5), opened.expert(2, 5)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(getattr(weights, name), getattr(read, name))
    for layer, expert in ((1, 1), (2, 4), (3, 0), (77, 0)):
        with pytest.raises(KeyError, match=f"host-0 does not hold expert {expert} of layer {layer}"):
            host.weights(layer, expert)


def test_an_expert_is_seen_only_once_it_is_complete(opened: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ExpertHost(opened.config, "host-0", 1)
    real = PackedExperts.load

    def watched(self: PackedExperts, *given: object) -> None:
        for step in (lambda: None, lambda: real(self, *given)):  # type: ignore[arg-type]
            step()
            assert host.held == ()
            with pytest.raises(HostRefused, match=r"^not_held: "):
                host.forward(ask(torch.zeros(1, 256), [0], [4], generation=1))
            with pytest.raises(KeyError):
                host.weights(1, 4)

    monkeypatch.setattr(PackedExperts, "load", watched)
    assert host.take(1, 4, opened.expert(1, 4))
    assert host.held == ((1, 4),)
    host.forward(ask(torch.zeros(1, 256), [0], [4], generation=1))


def test_taking_what_is_held_changes_nothing(opened: Checkpoint) -> None:
    host = ExpertHost(opened.config, "host-0", 1)
    assert host.take(1, 4, opened.expert(1, 4))
    inside = host._layers[1]._experts[4]
    before = host.stats()
    assert not host.take(1, 4, opened.expert(1, 5))
    host.load(opened, [(1, 4)])
    assert host._layers[1]._experts[4] is inside  # a request may be reading that memory
    assert host.stats() == before


@pytest.mark.parametrize(("pair", "said"), [((0, 1), "no routed experts"), ((1, 16), "it has 16"), ((1, -1), "-1")])
def test_an_expert_that_the_model_lacks_cannot_be_taken(
    opened: Checkpoint, host: ExpertHost, pair: tuple[int, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        host.take(*pair, opened.expert(1, 1))


def test_unloading_gives_the_memory_back_or_does_nothing(opened: Checkpoint) -> None:
    host = ExpertHost(opened.config, "host-0", 1)
    host.load(opened, HELD)
    before = host.stats()
    with pytest.raises(KeyError):
        host.unload([(1, 0), (1, 1)])
    assert host.stats() == before
    inside = weakref.ref(host._layers[1]._experts[0])
    host.unload([(1, 0), (1, 0)])
    assert inside() is None
    assert host.stats().experts == before.experts - 1


def test_weights_asked_for_while_they_go_are_whole_or_absent(opened: Checkpoint) -> None:
    host = ExpertHost(opened.config, "host-0", 1)
    read = opened.expert(1, 4)
    over = threading.Event()
    wrong: list[str] = []

    def ask_for_them() -> None:
        while not over.is_set():
            host.stats()
            try:
                if not torch.equal(host.weights(1, 4).down_proj, read.down_proj):
                    wrong.append("other bits")
            except KeyError:
                pass
            except Exception as error:  # noqa: BLE001 (nothing else may be raised)
                wrong.append(repr(error))

    asking = threading.Thread(target=ask_for_them)
    asking.start()
    for _ in range(20):
        host.take(1, 4, read)
        host.unload([(1, 4)])
    over.set()
    asking.join()
    assert wrong == []


def test_unloading_waits_for_what_is_being_computed(opened: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ExpertHost(opened.config, "host-0", 1)
    host.load(opened, [(1, 4)])
    x_RD = torch.randn(1, 256)
    expected = host.forward(ask(x_RD, [0], [4], generation=1)).y_PD
    real = PackedExperts.__call__
    unloading = threading.Thread(target=host.unload, args=([(1, 4)],))

    def slow_call(self: PackedExperts, *given: object) -> torch.Tensor:
        unloading.start()
        unloading.join(0.05)
        return real(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(PackedExperts, "__call__", slow_call)
    assert torch.equal(host.forward(ask(x_RD, [0], [4], generation=1)).y_PD, expected)
    unloading.join()
    assert host.held == ()
