"""The least work that a GPU has with a token: bytes that a decode step reads, FLOPs that a prompt's token takes.

Counted from the model's shape alone, so that a measured rate becomes a share of what the GPU could do.
"""

from model.config import ModelConfig
from services.footprint import ROUTED, Layout, by_kind, footprint


def distinct_experts(config: ModelConfig, batch: int) -> float:
    """Routed experts of one layer that `batch` tokens choose between them, on average: E · (1 - (1 - K/E)^B).

    That is where each token chooses evenly and for itself; a real router's choice is narrower, never wider.
    """
    experts = config.n_routed_experts
    return experts * (1.0 - (1.0 - config.num_experts_per_tok / experts) ** batch)


def step_bytes(config: ModelConfig, batch: int, length: int, number_bytes: int = 2) -> float:
    """Bytes that one decode step of `batch` sequences reads at least, each with `length` tokens in the cache.

    Counted are every weight that is not a routed expert's, once (the head is one of them; of the embedding only a row
    a sequence), the routed experts that the batch chooses on average, once, and every sequence's latents in every
    layer. A number takes `number_bytes` everywhere. What a step writes, and reads again, is not counted.
    """
    kinds = by_kind(config)
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    dense = kinds.total() - kinds[ROUTED] - looked_up + batch * config.hidden_size
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    routed = len(config.moe_layers) * distinct_experts(config, batch) * expert if config.moe_layers else 0.0
    latents = batch * length * config.num_hidden_layers * config.latent_width
    return number_bytes * (dense + routed + latents)


def token_flops(config: ModelConfig, prompt_tokens: int) -> float:
    """FLOPs that a token of a prompt of `prompt_tokens` takes at least, on average over the prompt.

    Counted are 2 for each weight that a token uses, without the embedding, which is looked up, and without the head,
    which the prompt's last token alone meets; and attention in its absorbed form: in each layer and head, for each
    pair of a query and a key before or at it, 2 for each number of the key (C + R) and of the value (C). A query of a
    causal prompt has (1 + prompt_tokens) / 2 keys on average.
    """
    head = config.vocab_size * config.hidden_size
    multiplied = footprint(config, Layout(hosts=1)).active - head
    pair = 2 * (config.latent_width + config.kv_lora_rank)
    pairs = config.num_hidden_layers * config.num_attention_heads * (1 + prompt_tokens) / 2
    return 2 * multiplied + 2 * head / prompt_tokens + pair * pairs
