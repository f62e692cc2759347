"""What the router of the bundled model chooses, counted over prompts: one process, one host, no service."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from attention.requests import GenerateRequest, SamplingParams
from bench.local_worker import SwitchedPlacement
from examples.bundled.conversations import examination
from experts.client import ExpertClient
from experts.host import ExpertHost
from experts.local import LocalTransport
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from router.load import LoadMeter
from router.placement import Host, initial_placement

MODEL = Path(__file__).parents[1] / "models" / "bundled"
QUESTIONS = 16  # of each family


@dataclass(frozen=True, slots=True)
class RecordedLoad:
    """Rows of each expert, by layer, and how they were chosen."""

    loads: Mapping[int, Sequence[int]]
    groups: int
    topk_group: int
    tokens: int


def record_loads() -> RecordedLoad:
    """Read questions that the bundled model was examined with, and count."""
    checkpoint, tokenizer = Checkpoint.open(MODEL), Tokenizer.load(MODEL)
    config = checkpoint.config
    source = SwitchedPlacement(initial_placement(config, [Host("host-0", 1, "local")]))
    host = ExpertHost(config, "host-0", 1)
    host.load(checkpoint, source.placement.held_by("host-0"))
    meter = LoadMeter(config.moe_layers, config.n_routed_experts)
    client = ExpertClient(LocalTransport({"host-0": host}), source, meter=meter)
    engine = Engine(Decoder(checkpoint, client, source), EngineLimits())
    for number, conversation in enumerate(examination(seed=0, count=QUESTIONS)):
        messages = conversation.record(number)["messages"]
        assert isinstance(messages, list)
        prompt = tuple(tokenizer.apply_chat_template(messages[:-1]))
        engine.submit(GenerateRequest(str(number), prompt, SamplingParams(max_tokens=1, temperature=0.0)))
    while engine.has_work:
        engine.step()
    return RecordedLoad(meter.take(), config.n_group, config.topk_group, engine.stats().prompt_tokens)
