"""What the router of the bundled model chooses, counted over prompts: one process, one host, no service."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from attention.requests import GenerateRequest, SamplingParams
from bench.local_worker import SwitchedPlacement
from bench.prompts import draw_prompts
from experts.client import ExpertClient
from experts.host import ExpertHost
from experts.local import LocalTransport
from model.bundled import write_bundled
from model.checkpoint import Checkpoint
from router.load import LoadMeter
from router.placement import Host, initial_placement

PROMPTS, TOKENS = 32, 128


@dataclass(frozen=True, slots=True)
class RecordedLoad:
    """Rows of each expert, by layer, and how they were chosen."""

    loads: Mapping[int, Sequence[int]]
    groups: int
    topk_group: int
    tokens: int


def record_loads() -> RecordedLoad:
    """Compute seeded prompts with seeded weights, and count."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Checkpoint.open(write_bundled(Path(directory) / "bundled"))
        config = checkpoint.config
        source = SwitchedPlacement(initial_placement(config, [Host("host-0", 1, "local")]))
        host = ExpertHost(config, "host-0", 1)
        host.load(checkpoint, source.placement.held_by("host-0"))
        meter = LoadMeter(config.moe_layers, config.n_routed_experts)
        client = ExpertClient(LocalTransport({"host-0": host}), source, meter=meter)
        engine = Engine(Decoder(checkpoint, client, source), EngineLimits())
        for index, prompt in enumerate(draw_prompts("balance", PROMPTS, TOKENS, config.vocab_size)):
            engine.submit(GenerateRequest(str(index), prompt, SamplingParams(max_tokens=1, temperature=0.0)))
        while engine.has_work:
            engine.step()
        return RecordedLoad(meter.take(), config.n_group, config.topk_group, engine.stats().prompt_tokens)
