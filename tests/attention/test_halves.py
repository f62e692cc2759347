"""A step computed as two halves in turn: the same bits, hosts busy with one while the other is attended to."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from attention.requests import GenerateRequest
from attention.scheduler import SchedulerLimits
from experts.client import ExpertClient
from experts.errors import HostUnavailable
from experts.host import ExpertHost
from experts.local import LocalTransport
from experts.messages import ForwardReply, ForwardRequest
from experts.static import StaticPlacement
from experts.transport import Pending
from model.checkpoint import Checkpoint
from router.placement import Host
from tests.serving import greedy, make_hosts, run

LIMITS = EngineLimits(cache_blocks=256, block_size=4, scheduler=SchedulerLimits(step_tokens=37, running=8))


class Watched(LocalTransport):
    """Local hosts, of whose calls it notes what is sent and read; from call `dies_at` on, nobody answers."""

    def __init__(self, hosts: Mapping[str, ExpertHost]) -> None:
        super().__init__(hosts)
        self.events: list[tuple[str, int, int]] = []  # what happened, layer, rows
        self.open: set[object] = set()
        self.calls = 0
        self.dies_at: int | None = None

    def submit(self, host: Host, request: ForwardRequest) -> Pending:
        self.calls += 1
        self.events.append(("sent", request.layer, request.x_RD.shape[0]))
        dead = self.dies_at is not None and self.calls >= self.dies_at
        return Call(self, super().submit(host, request), request, dead)


class Call:
    def __init__(self, watched: Watched, inner: Pending, request: ForwardRequest, dead: bool) -> None:
        self._watched, self._inner, self._request, self._dead = watched, inner, request, dead
        watched.open.add(self)

    def result(self, timeout_s: float) -> ForwardReply:
        if self._dead:
            raise HostUnavailable("gone")
        self._watched.events.append(("read", self._request.layer, self._request.x_RD.shape[0]))
        return self._inner.result(timeout_s)

    def release(self) -> None:
        self._watched.open.discard(self)


def make(path: Path, hosts: int, halve_from: int | None) -> tuple[Engine, Watched]:
    checkpoint = Checkpoint.open(path)
    loaded, placement = make_hosts(checkpoint, hosts)
    source, watched = StaticPlacement(placement), Watched(loaded)
    client = ExpertClient(watched, source, deadline_s=0.0)
    return Engine(Decoder(checkpoint, client, source, halve_from=halve_from), LIMITS), watched


def requests(seed: int) -> list[GenerateRequest]:
    """Long and short prompts, so that halves are cut within sequences and between them."""
    rng = random.Random(seed)
    lengths = (1, 90, 3, 17, 40, 2)
    prompts = [[rng.randrange(2, 512) for _ in range(length)] for length in lengths]
    return [
        greedy(str(number), prompt, 6, logprobs=3, prompt_logprobs=number % 3 or None)
        for number, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("hosts", [1, 3])
@pytest.mark.parametrize("halve_from", [1, 20])
def test_halves_give_the_same_bits(checkpoint: Callable[[str], Path], hosts: int, halve_from: int) -> None:
    (whole, _), (halved, watched) = make(checkpoint("tiny"), hosts, None), make(checkpoint("tiny"), hosts, halve_from)
    for seed in range(2):
        expected, got = run(whole, requests(seed)), run(halved, requests(seed))
        for name, answer in expected.items():
            assert vars(got[name]) == vars(answer)
    assert not watched.open


@pytest.mark.parametrize(("beside", "sent"), [(0, 2), (1, 1), (2, 1), (3, 2)])
def test_few_hosts_of_the_same_cores_compute_whole_steps(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, beside: int, sent: int
) -> None:
    engine, watched = make(checkpoint("tiny"), 1, 30)
    monkeypatch.setattr(ExpertClient, "beside", lambda self, placement: beside)
    engine.submit(greedy("long", [5, 6, 7] * 12, 2))
    engine.step()
    layers = {layer for _, layer, _ in watched.events}
    assert len([what for what, _, _ in watched.events if what == "sent"]) == sent * len(layers)


def test_both_halves_are_with_the_hosts_at_once(checkpoint: Callable[[str], Path]) -> None:
    engine, watched = make(checkpoint("tiny"), 1, 30)
    engine.submit(greedy("long", [5, 6, 7] * 12, 2))
    engine.step()
    layers = sorted({layer for _, layer, _ in watched.events})
    first, second = layers[:2]
    assert watched.events[:4] == [("sent", first, 18), ("sent", first, 18), ("read", first, 18), ("sent", second, 18)]
    assert len(watched.events) == 4 * len(layers)
    watched.events.clear()
    engine.step()  # one token
    assert [rows for _, _, rows in watched.events] == [1] * 2 * len(layers)


def test_a_half_that_fails_lets_go_of_the_other(checkpoint: Callable[[str], Path]) -> None:
    engine, watched = make(checkpoint("tiny"), 2, 30)
    for dies_at in (1, 3, 4, 7):  # two hosts: the first half's calls are 1 and 2, the second's 3 and 4
        watched.calls, watched.dies_at = 0, dies_at
        answer = run(engine, [greedy("long", [5, 6, 7] * 12, 2)])["long"]
        assert answer.finish_reason == "error"
        assert not watched.open
        watched.dies_at = None
    good = run(engine, [greedy("long", [5, 6, 7] * 12, 2)])["long"]
    whole, _ = make(checkpoint("tiny"), 2, None)
    assert good.tokens == run(whole, [greedy("long", [5, 6, 7] * 12, 2)])["long"].tokens
