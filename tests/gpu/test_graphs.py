"""When decode steps are recorded, and what becomes of them, by a recorder that needs no GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from attention.cache import LatentCache
from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from attention.graphs import StepGraphs
from attention.recorder import Recorded, Recorder
from experts.client import ExpertClient
from experts.host import ExpertHost
from experts.local import LocalTransport
from experts.static import StaticPlacement
from model.checkpoint import Checkpoint
from router.placement import Host, Placement
from tests.serving import Answer, greedy, make_engine, make_hosts, run

pytestmark = pytest.mark.usefixtures("interpreted")
LIMITS = EngineLimits(cache_blocks=16, max_length=64)
PROMPT = (7,)  # of one token, as each of a request's steps then is: the first, one that is recorded, one more


class ByHand(Recorder):
    """Computes again what it recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int = 100) -> None:
        super().__init__(torch.device("cpu"))
        self._monkeypatch = monkeypatch
        self._room = room
        self.between: Callable[[], None] = lambda: None  # the first call and the second
        self.replayed = 0

    def record(self, compute: Callable[[], Tensor]) -> Recorded:
        compute()
        self.between()
        self._room -= 1
        if self._room < 0:
            raise torch.OutOfMemoryError
        with self._monkeypatch.context() as patch:
            patch.setattr(Tensor, "cpu", waits)
            out = compute()

        @torch.inference_mode()
        def replay() -> None:
            self.replayed += 1
            out.copy_(compute())

        return Recorded(replay, out)


def waits(tensor: Tensor) -> NoReturn:
    raise RuntimeError("operation not permitted when stream is capturing")


class Source(StaticPlacement):
    """Whose table changes."""

    def become(self, placement: Placement) -> None:
        object.__setattr__(self, "placement", placement)


class Rig:
    """An engine over hosts of this process, whose decode steps are recorded."""

    def __init__(self, checkpoint: Checkpoint, recorder: Recorder, hosts: int = 1, replicas: int = 1) -> None:
        self.hosts, placement = make_hosts(checkpoint, hosts, replicas)
        self.source = Source(placement)
        decoder = Decoder(checkpoint, ExpertClient(LocalTransport(self.hosts), self.source), self.source)
        self.engine = Engine(decoder, LIMITS)
        blocks = LIMITS.cache_blocks
        self.engine._cache = LatentCache(checkpoint.config, blocks + 1, LIMITS.block_size)
        self.engine._graphs = StepGraphs(decoder, self.engine._cache, blocks, blocks, recorder)

    @property
    def steps(self) -> int:
        assert self.engine._graphs is not None
        return len(self.engine._graphs._steps)


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint("least"))


@pytest.fixture(scope="module")
def wanted(opened: Checkpoint) -> Answer:
    """By the CPU's own kernels."""
    return run(make_engine(opened.directory, 1, LIMITS), [greedy("a", PROMPT, 3, logprobs=1)])["a"]


def answers_like(rig: "Rig", wanted: Answer, tokens: int = 2) -> None:
    answer = run(rig.engine, [greedy("a", PROMPT, tokens, logprobs=1)])["a"]
    assert (answer.error, answer.tokens) == (None, wanted.tokens[:tokens])
    for ours, theirs in zip(answer.logprobs, wanted.logprobs[:tokens], strict=True):
        assert abs(ours.logprob - theirs.logprob) < 1e-4


def test_a_replayed_step_gives_what_another_does_and_is_of_its_hosts_alone(
    opened: Checkpoint, wanted: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = ByHand(monkeypatch)
    rig = Rig(opened, recorder)
    answers_like(rig, wanted, tokens=3)
    assert recorder.replayed == 2
    assert rig.steps == 1
    (found,) = rig.hosts.values()
    again = rig.hosts[found.host_id] = ExpertHost(opened.config, found.host_id, found.generation)
    again.load(opened, found.held)
    assert again.changes == found.changes
    answers_like(rig, wanted, tokens=1)
    assert recorder.replayed == 2
    assert rig.steps == 0


def test_a_step_that_another_holder_has_to_answer_is_not_recorded(
    opened: Checkpoint, wanted: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(opened, ByHand(monkeypatch), hosts=2, replicas=2)
    layer = opened.config.moe_layers[0]
    rig.hosts["host-0"].unload([(layer, expert) for expert in range(opened.config.n_routed_experts)])
    answers_like(rig, wanted)
    assert rig.steps == 0


def test_a_table_that_comes_while_a_step_is_recorded_is_the_next_ones(
    opened: Checkpoint, wanted: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = ByHand(monkeypatch)
    rig = Rig(opened, recorder)
    before = rig.source.placement
    elsewhere = Placement(2, (*before.hosts, Host("elsewhere", 1, "far")), before.owners)
    recorder.between = lambda: rig.source.become(elsewhere)
    answers_like(rig, wanted, tokens=3)
    assert recorder.replayed == 1
    assert rig.steps == 0  # of hosts that are no longer all near, none is kept


def test_a_device_without_room_for_a_graph_computes_steps_without(
    opened: Checkpoint, wanted: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = ByHand(monkeypatch, room=0)
    rig = Rig(opened, recorder)
    answers_like(rig, wanted)
    assert rig.steps == 0
    recorder._room = 100
    spare = opened.config.moe_layers[0], 0
    rig.hosts["host-0"].unload([spare])
    rig.hosts["host-0"].load(opened, [spare])
    answers_like(rig, wanted)
    assert rig.steps == 1  # experts have moved, and it is tried again
