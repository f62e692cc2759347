"""A whole model in one process, without Ray: expert hosts, client and engine, for tests."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from attention.requests import GenerateRequest, SamplingParams, TokenLogprob, Update
from experts.client import ExpertClient
from experts.host import ExpertHost
from experts.local import LocalTransport
from experts.static import StaticPlacement
from experts.transport import Transport
from model.adapters.overlay import open_with_adapters
from model.checkpoint import Checkpoint
from model.grammar import Grammars
from router.placement import Host, Placement, initial_placement


def make_hosts(
    checkpoint: Checkpoint, count: int, replicas: int = 1, device: str = "cpu"
) -> tuple[dict[str, ExpertHost], Placement]:
    """`count` loaded hosts and the placement that names them."""
    names = [Host(f"host-{index}", 1, "local") for index in range(count)]
    placement = initial_placement(checkpoint.config, names, replicas)
    hosts: dict[str, ExpertHost] = {}
    for name in names:
        hosts[name.id] = ExpertHost(checkpoint.config, name.id, name.generation, device)
        hosts[name.id].load(checkpoint, placement.held_by(name.id))
    return hosts, placement


def make_engine(
    path: Path,
    hosts: int = 2,
    limits: EngineLimits | None = None,
    transport: Transport | None = None,
    device: str = "cpu",
    adapters: Sequence[Path] = (),
    grammars: Grammars | None = None,
) -> Engine:
    """An engine over `hosts` local expert hosts."""
    checkpoint = open_with_adapters(path, adapters)
    loaded, placement = make_hosts(checkpoint, hosts, device=device)
    source = StaticPlacement(placement)
    client = ExpertClient(transport or LocalTransport(loaded), source)
    return Engine(Decoder(checkpoint, client, source, device), limits or EngineLimits(cache_blocks=256), grammars)


class Answer:
    """Everything that one request got."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.cached_tokens = 0

    def add(self, update: Update) -> None:
        assert self.finish_reason is None, "an update after the end"
        self.tokens.extend(update.token_ids)
        self.logprobs.extend(update.logprobs or ())
        self.prompt_logprobs.extend(update.prompt_logprobs or ())
        self.finish_reason = update.finish_reason
        self.error = update.error
        self.cached_tokens = update.cached_tokens


def run(engine: Engine, requests: Iterable[GenerateRequest], max_steps: int = 10_000) -> dict[str, Answer]:
    """Submit everything, step until all are done."""
    answers: dict[str, Answer] = {}
    for request in requests:
        engine.submit(request)
        answers[request.id] = Answer()
    for _ in range(max_steps):
        if not engine.has_work:
            return answers
        for update in engine.step():
            answers[update.id].add(update)
    raise AssertionError(f"{max_steps} steps were not enough")


def greedy(request_id: str, prompt: Iterable[int], tokens: int, **params: object) -> GenerateRequest:
    """A greedy request that runs to its full length."""
    settings: dict[str, object] = {"temperature": 0.0, "ignore_eos": True} | params
    return GenerateRequest(request_id, tuple(prompt), SamplingParams(max_tokens=tokens, **settings))  # type: ignore[arg-type]
