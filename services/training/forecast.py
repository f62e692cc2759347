"""What a recipe will need, before anything is started."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from attention.training.decoder import head_tokens
from model.adapters.spec import lora_tensors
from model.config import ModelConfig
from model.tensors import expected_tensors
from services.training.method import keeps_activations, lora_spec
from services.training.recipe import Recipe

NUMBER_BYTES = 4  # of weights, gradients and moments, all fp32


@dataclass(frozen=True, slots=True)
class StageForecast:
    """What each step has from one step on."""

    from_step: int
    tokens: int
    micro_batches: int  # of a worker, with the fewest workers


@dataclass(frozen=True, slots=True)
class Forecast:
    """Counts of parameters, and bytes of the largest actor of each kind, activations aside."""

    dense: int
    experts: int
    trained_dense: int
    trained_experts: int  # at most, where ESFT has not chosen yet
    host_bytes: int
    worker_bytes: int
    activation_bytes: int  # of a worker's micro-batch: an estimate
    host_activation_bytes: int  # kept by a host of all workers' micro-batches, were all experts chosen equally often
    stages: tuple[StageForecast, ...]


def forecast(recipe: Recipe, config: ModelConfig) -> Forecast:
    """Raises AdapterError for a LoRA target that the model lacks."""
    sizes = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    dense, experts = _split(sizes)
    trained_dense, trained_experts = dense, experts
    if recipe.method == "lora":
        spec = lora_spec(recipe, config)
        factors = {name: math.prod(shape) for name, shape in lora_tensors(config, spec).items()}
        trained_dense, trained_experts = _split(factors)
    elif recipe.method == "esft":
        trained_dense = 0
    hosts, replicas = recipe.experts.hosts, recipe.experts.replicas
    workers = recipe.workers.least
    share = -(-config.n_routed_experts * replicas // hosts) / config.n_routed_experts  # of the experts, at the fullest
    rounded = 1 if recipe.dtype == "bfloat16" else 0
    if recipe.method == "full":
        host = share * experts * (4 + rounded)  # the value is one of the four: value, gradient, two moments
        worker = dense * 2 + trained_dense * 2 // workers
    else:
        host = share * (experts * (1 + rounded) + trained_experts * (3 if recipe.method == "esft" else 4))
        worker = dense + trained_dense * 4
    micro = recipe.micro_batch_tokens * workers
    return Forecast(
        dense=dense,
        experts=experts,
        trained_dense=trained_dense,
        trained_experts=trained_experts,
        host_bytes=int(host * NUMBER_BYTES),
        worker_bytes=int(worker * NUMBER_BYTES),
        activation_bytes=_activations(recipe, config),
        host_activation_bytes=_host_activations(recipe, config) * workers // hosts,
        stages=tuple(
            StageForecast(stage.from_step, stage.tokens, -(-stage.tokens // micro)) for stage in recipe.stages
        ),
    )


def _split(sizes: Mapping[str, int]) -> tuple[int, int]:
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    return sum(sizes.values()) - experts, experts


def _activations(recipe: Recipe, config: ModelConfig) -> int:
    """What autograd keeps of a micro-batch, with one chunk of logits and two more of its size on the way."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kept = heads * (2 * config.qk_head_dim + config.qk_nope_head_dim + 2 * config.v_head_dim)
    attention = kept + 2 * (config.q_lora_rank or 0) + config.latent_width + config.kv_lora_rank
    moe = len(config.moe_layers)
    shared, dense = config.moe_intermediate_size * config.n_shared_experts, config.intermediate_size
    again = layers * attention + 4 * (moe * shared + (layers - moe) * dense)
    if recipe.checkpointing:
        row = 3 * config.hidden_size * layers + again // layers  # of a layer at a time
    else:
        row = 4 * config.hidden_size * layers + again
    logits = 3 * min(recipe.micro_batch_tokens, head_tokens(config)) * config.vocab_size
    return NUMBER_BYTES * (recipe.micro_batch_tokens * row + logits)


def _host_activations(recipe: Recipe, config: ModelConfig) -> int:
    """Of one worker's micro-batch, on all hosts: an input row and both halves of its network for each slot."""
    if not keeps_activations(recipe):
        return 0
    slots = recipe.micro_batch_tokens * config.num_experts_per_tok * len(config.moe_layers)
    return NUMBER_BYTES * slots * (config.hidden_size + 2 * config.moe_intermediate_size)
