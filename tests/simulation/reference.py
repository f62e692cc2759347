"""The model that is simulated, the requests that are asked, and what each of them must be answered."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from attention.decoder import Decoder
from attention.engine import Engine, EngineLimits
from attention.requests import GenerateRequest, SamplingParams
from cluster.plan import ModelShape
from experts.client import ExpertClient
from experts.host import ExpertHost
from experts.local import LocalTransport
from experts.static import StaticPlacement
from kernels.threads import set_threads
from model.checkpoint import Checkpoint, ExpertWeights
from router.holding import Pair
from router.placement import Host, initial_placement
from tests.serving import Answer, run

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,  # of two, the order of a sum would not show
    "max_position_embeddings": 128,
}
NAMES = ("grouped", "free")  # experts in four routing groups, and in one
POOL = 30
LONGEST = 26  # tokens of prompt and answer


@dataclass(frozen=True, slots=True)
class Reference:
    """One model, its weights in memory, and the undisturbed answers."""

    checkpoint: Checkpoint
    decoder: Decoder  # to be copied, with another client
    shape: ModelShape
    weights: Mapping[Pair, ExpertWeights]
    requests: tuple[GenerateRequest, ...]
    answers: tuple[Answer, ...]

    def numbered(self, index: int, number: int) -> GenerateRequest:
        """A request of the pool, under an id of its own."""
        return replace(self.requests[index], id=f"{number}-of-{index}")


@dataclass(frozen=True, slots=True)
class InMemory:
    """The part of a Checkpoint that an ExpertHost reads, over weights that are at hand."""

    weights: Mapping[Pair, ExpertWeights]

    def experts(self, layer: int, experts: list[int]) -> list[ExpertWeights]:
        return [self.weights[layer, expert] for expert in experts]


def write_models(directory: Path) -> None:
    """A checkpoint of each of NAMES, in a directory of its name."""
    from tests.checkpoints import BASE, LITE_LIKE, V2_LIKE, write_checkpoint  # who only reads them is spared the oracle

    for name, kind in zip(NAMES, (V2_LIKE | {"q_lora_rank": 16}, LITE_LIKE), strict=True):
        write_checkpoint(BASE | kind | SMALL, directory / name)


@cache
def open_references(directory: Path) -> tuple[Reference, ...]:
    """One of each checkpoint, computed once a process."""
    set_threads(1)
    return tuple(_open(directory / name) for name in NAMES)


def _open(path: Path) -> Reference:
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    weights = {
        (layer, expert): checkpoint.expert(layer, expert)
        for layer in config.moe_layers
        for expert in range(config.n_routed_experts)
    }
    name = Host("host-0", 1, "local")
    host = ExpertHost(config, name.id, name.generation)
    host.load(InMemory(weights), sorted(weights))  # type: ignore[arg-type]
    source = StaticPlacement(initial_placement(config, [name]))
    decoder = Decoder(checkpoint, ExpertClient(LocalTransport({name.id: host}), source), source)
    requests = tuple(_requests(random.Random(5)))
    limits = EngineLimits(cache_blocks=64, block_size=4)
    answers = tuple(run(Engine(decoder, limits), [request])[request.id] for request in requests)
    shape = ModelShape(config.moe_layers, config.n_routed_experts, config.n_group)
    return Reference(checkpoint, decoder, shape, weights, requests, answers)


def _requests(rng: random.Random) -> list[GenerateRequest]:
    """Greedy and drawn ones, long and short, some that share a beginning, some whose prompt is scored."""
    shared = [tuple(rng.randrange(2, 64) for _ in range(9)) for _ in range(2)]
    requests: list[GenerateRequest] = []
    for number in range(POOL):
        prompt = tuple(rng.randrange(2, 64) for _ in range(rng.randint(1, 7)))
        if number % 3:
            prompt = shared[number % 2] + prompt
        params = SamplingParams(
            max_tokens=rng.randint(3, 10),
            temperature=rng.choice((0.0, 0.8, 1.2)),
            seed=rng.randrange(1, 1 << 40),
            logprobs=rng.randint(0, 3),
            prompt_logprobs=rng.randint(0, 2) if number % 4 == 0 else None,
            ignore_eos=rng.random() < 0.7,
        )
        if number % 5 == 1:
            params = replace(params, presence_penalty=0.5, repetition_penalty=1.1, top_p=0.9)
        if number == 8:
            params = replace(params, max_tokens=0)
        requests.append(GenerateRequest(str(number), prompt, params))
    return requests
