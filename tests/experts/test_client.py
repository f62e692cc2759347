"""Dispatch and combine against a slow oracle, and what the client does when hosts fail."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from experts.client import ExpertClient
from experts.errors import ExpertsUnavailable, HostRefused, HostUnavailable
from experts.host import ExpertHost
from experts.local import LocalTransport
from experts.messages import ForwardReply, ForwardRequest
from experts.static import StaticPlacement
from experts.transport import Pending
from kernels.combine import SHARED_ROWS
from model.checkpoint import Checkpoint
from router.gate import Routing, route
from router.placement import Host, Placement
from tests.serving import make_hosts

LAYER = 2


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("tiny"))


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(11, 256, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def routing(opened: Checkpoint) -> Routing:
    return route(torch.randn(11, 16, generator=torch.Generator().manual_seed(4)), opened.config)


def slow(opened: Checkpoint, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """sum over slots of weight * expert(row), a token and a slot at a time, in float64."""
    out = torch.zeros(x_TD.shape, dtype=torch.float64)
    for token, x_D in enumerate(x_TD.double()):
        for expert, weight in zip(routing.experts_TK[token], routing.weights_TK[token], strict=True):
            w = opened.expert(LAYER, int(expert))
            gate, up = w.gate_proj.double() @ x_D, w.up_proj.double() @ x_D
            out[token] += float(weight) * (w.down_proj.double() @ (gate * torch.sigmoid(gate) * up))
    return out


class Recorded:
    """A transport over local hosts that keeps what was sent and can be told to fail."""

    def __init__(self, hosts: dict[str, ExpertHost]) -> None:
        self.hosts = hosts
        self.sent: list[tuple[Host, ForwardRequest]] = []
        self.flushed: list[int] = []  # requests sent by then
        self.released = 0
        self.down: set[str] = set()
        self.spoiled: Callable[[ForwardReply], ForwardReply] | None = None
        self._local = LocalTransport(hosts)

    def submit(self, host: Host, request: ForwardRequest) -> Pending:
        self.sent.append((host, request))
        return _Reply(self, host, self._local.submit(host, request))

    def lanes(self, hosts: Sequence[Host]) -> None:
        return None

    def flush(self) -> None:
        self.flushed.append(len(self.sent))

    def forget(self, host: Host) -> None:
        pass

    def close(self) -> None:
        pass


class _Reply:
    def __init__(self, transport: Recorded, host: Host, inner: Pending) -> None:
        self._transport, self._host, self._inner = transport, host, inner

    def result(self, timeout_s: float) -> ForwardReply:
        if self._host.id in self._transport.down:
            raise HostUnavailable(f"{self._host.id} is down")
        reply = self._inner.result(timeout_s)
        spoiled, self._transport.spoiled = self._transport.spoiled, None
        return spoiled(reply) if spoiled else reply

    def release(self) -> None:
        self._transport.released += 1


def compute(client: ExpertClient, placement: Placement, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
    return client.start(LAYER, x_TD, routing, placement).finish()


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_any_placement_gives_the_slow_sum_and_the_same_bits(
    opened: Checkpoint, rows: torch.Tensor, routing: Routing, count: int, replicas: int
) -> None:
    one, alone = make_hosts(opened, 1)
    reference = compute(ExpertClient(LocalTransport(one), StaticPlacement(alone)), alone, rows, routing)
    assert torch.allclose(reference.double(), slow(opened, rows, routing), atol=1e-5)
    hosts, placement = make_hosts(opened, count, replicas)
    total = compute(ExpertClient(LocalTransport(hosts), StaticPlacement(placement)), placement, rows, routing)
    assert torch.equal(total, reference)


@pytest.mark.parametrize("victim", [None, "host-0", "host-1"])
def test_rows_of_busy_experts_go_to_all_their_holders_and_no_bit_changes(
    opened: Checkpoint, victim: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch in which experts have as many rows as a prompt gives them, also when a holder is lost."""
    x_TD = torch.randn(300, 256, generator=torch.Generator().manual_seed(5))
    routing = route(torch.randn(300, 16, generator=torch.Generator().manual_seed(6)), opened.config)
    one, alone = make_hosts(opened, 1)
    reference = compute(ExpertClient(LocalTransport(one), StaticPlacement(alone)), alone, x_TD, routing)
    hosts, placement = make_hosts(opened, 3, replicas=2)
    transport = Recorded(hosts)
    transport.down = {victim} - {None}  # type: ignore[assignment]
    client = ExpertClient(transport, StaticPlacement(placement), deadline_s=0.0)
    assert torch.equal(compute(client, placement, x_TD, routing), reference)
    asked: dict[int, Counter[str]] = {}
    for host, request in transport.sent[:3]:
        for expert in request.pair_expert_P.tolist():
            asked.setdefault(expert, Counter())[host.id] += 1
    rows_E = torch.bincount(routing.experts_TK.reshape(-1), minlength=16)
    busy = [expert for expert in range(16) if rows_E[expert] >= SHARED_ROWS]
    assert len(busy) > 8
    for expert in busy:
        assert len(asked[expert]) == 2
        assert max(asked[expert].values()) < 0.7 * int(rows_E[expert])


def test_a_row_travels_once_to_a_host(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    hosts, placement = make_hosts(opened, 2)
    transport = Recorded(hosts)
    compute(ExpertClient(transport, StaticPlacement(placement)), placement, rows, routing)
    assert len(transport.sent) == 2
    for host, request in transport.sent:
        held = {expert for layer, expert in placement.held_by(host.id) if layer == LAYER}
        wanted = [row for row in range(len(rows)) if held & set(routing.experts_TK[row].tolist())]
        assert len(request.x_RD) == len(wanted)
        assert torch.equal(request.x_RD, rows[wanted])
        assert set(request.pair_expert_P.tolist()) <= held
    assert sum(len(request.pair_row_P) for _, request in transport.sent) == routing.experts_TK.numel()


def test_hosts_are_woken_when_all_of_a_layer_is_sent(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    hosts, placement = make_hosts(opened, 3)
    transport = Recorded(hosts)
    compute(ExpertClient(transport, StaticPlacement(placement)), placement, rows, routing)
    assert transport.flushed == [len(transport.sent)] == [3]


def test_a_lost_host_with_a_replica_costs_a_resend_and_no_bit(
    opened: Checkpoint, rows: torch.Tensor, routing: Routing
) -> None:
    hosts, placement = make_hosts(opened, 3, replicas=2)
    transport = Recorded(hosts)
    client = ExpertClient(transport, StaticPlacement(placement), deadline_s=0.0)
    reference = compute(client, placement, rows, routing)
    for victim in hosts:
        transport.down = {victim}
        assert torch.equal(compute(client, placement, rows, routing), reference)
    assert client.stats().resends >= 3


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_replicas_take_turns_however_many_layers_a_step_has(
    opened: Checkpoint, rows: torch.Tensor, routing: Routing, layers: int
) -> None:
    hosts, placement = make_hosts(opened, 2, replicas=2)
    transport = Recorded(hosts)
    client = ExpertClient(transport, StaticPlacement(placement))
    for _ in range(4):
        for layer in opened.config.moe_layers[:layers]:
            client.start(layer, rows, routing, placement).finish()
    pairs: Counter[tuple[int, str]] = Counter()
    for host, request in transport.sent:
        pairs[request.layer, host.id] += len(request.pair_row_P)
    assert set(pairs.values()) == {2 * routing.experts_TK.numel()}
    assert len(pairs) == 2 * layers


class Supervised:
    """A placement source that brings the lost host's next life after a few looks."""

    def __init__(self, placement: Placement, hosts: dict[str, ExpertHost], transport: Recorded) -> None:
        self._placement, self._hosts, self._transport = placement, hosts, transport
        self.looks = 0
        self.reports: list[Host] = []

    def snapshot(self) -> Placement:
        return self._placement

    def names(self, host: Host) -> bool:
        return host in self._placement.hosts

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        self.looks += 1
        if self.looks == 3:
            lives = [
                Host(host.id, host.generation + (host.id in self._transport.down), host.address)
                for host in self._placement.hosts
            ]
            for host in lives:
                self._hosts[host.id].generation = host.generation
            self._transport.down = set()
            self._placement = self._placement.with_hosts(lives)
        return self._placement

    def report(self, host: Host, reason: str) -> None:
        self.reports.append(host)


def test_without_a_replica_it_waits_for_the_next_life(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    hosts, placement = make_hosts(opened, 2)
    transport = Recorded(hosts)
    reference = compute(ExpertClient(transport, StaticPlacement(placement)), placement, rows, routing)
    source = Supervised(placement, hosts, transport)
    transport.down = {"host-1"}
    transport.sent.clear()
    total = compute(ExpertClient(transport, source), placement, rows, routing)
    assert torch.equal(total, reference)
    assert {host.id for host in source.reports} == {"host-1"}
    assert transport.sent[-1][1].generation == 2


def test_past_the_deadline_it_names_the_experts(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    hosts, placement = make_hosts(opened, 2)
    transport = Recorded(hosts)
    transport.down = {"host-0"}
    client = ExpertClient(transport, StaticPlacement(placement), deadline_s=0.05)
    with pytest.raises(ExpertsUnavailable, match=r"layer 2: no host answered for experts .* \(host-0 is down\)"):
        compute(client, placement, rows, routing)


def test_a_reply_of_an_older_life_is_not_used(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    hosts, placement = make_hosts(opened, 2, replicas=2)
    transport = Recorded(hosts)
    client = ExpertClient(transport, StaticPlacement(placement))
    reference = compute(client, placement, rows, routing)
    transport.spoiled = lambda reply: ForwardReply(reply.generation - 1, torch.zeros_like(reply.y_PD))
    assert torch.equal(compute(client, placement, rows, routing), reference)


@pytest.mark.parametrize(
    "lie", [lambda y_PD: y_PD[:-1], lambda y_PD: y_PD[:, :-1], lambda y_PD: y_PD.view(-1), lambda y_PD: y_PD[None]]
)
def test_a_reply_of_another_shape_is_not_used(
    opened: Checkpoint, rows: torch.Tensor, routing: Routing, lie: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    hosts, placement = make_hosts(opened, 2, replicas=2)
    transport = Recorded(hosts)
    client = ExpertClient(transport, StaticPlacement(placement))
    reference = compute(client, placement, rows, routing)
    transport.spoiled = lambda reply: ForwardReply(reply.generation, lie(reply.y_PD))
    assert torch.equal(compute(client, placement, rows, routing), reference)
    assert client.stats().resends == 1
    assert transport.released == len(transport.sent)


@pytest.mark.parametrize(
    ("x_RD", "row_P", "expert_P"),
    [
        (torch.zeros(8), torch.zeros(1).int(), torch.zeros(1).int()),
        (torch.zeros(1, 8).double(), torch.zeros(1).int(), torch.zeros(1).int()),
        (torch.zeros(1, 8), torch.zeros(1).long(), torch.zeros(1).int()),
        (torch.zeros(1, 8), torch.zeros(1).int(), torch.zeros(1).long()),
        (torch.zeros(1, 8), torch.zeros(1, 1).int(), torch.zeros(1, 1).int()),
        (torch.zeros(1, 8), torch.zeros(2).int(), torch.zeros(1).int()),
    ],
)
def test_a_request_whose_tensors_do_not_agree_is_not_made(
    x_RD: torch.Tensor, row_P: torch.Tensor, expert_P: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"expected|pair rows for"):
        ForwardRequest(1, 1, 1, x_RD, row_P, expert_P)


def test_a_refusal_that_no_resend_can_mend_is_raised(opened: Checkpoint, rows: torch.Tensor, routing: Routing) -> None:
    hosts, placement = make_hosts(opened, 2)
    client = ExpertClient(LocalTransport(hosts), StaticPlacement(placement))
    with pytest.raises(HostRefused, match="8 wide; expected 256"):
        compute(client, placement, rows[:, :8], routing)
