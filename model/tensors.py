"""Every tensor a checkpoint must hold, under Hugging Face's names, as [out, in]."""

from model.config import ModelConfig

Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name to shape, in the order of the layers."""
    hidden = config.hidden_size
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, shape in _attention(config).items():
            tensors[f"{prefix}.self_attn.{name}.weight"] = shape
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, shape in (_moe(config) if config.is_moe(layer) else _mlp(hidden, config.intermediate_size)).items():
            tensors[f"{prefix}.mlp.{name}.weight"] = shape
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def expert_names(layer: int, expert: int) -> tuple[str, str, str]:
    """Names of one routed expert's gate, up and down projection."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


def _attention(config: ModelConfig) -> dict[str, Shape]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries = heads * config.qk_head_dim
    query: dict[str, Shape] = {"q_proj": (queries, hidden)}
    if config.q_lora_rank is not None:
        rank = config.q_lora_rank
        query = {"q_a_proj": (rank, hidden), "q_a_layernorm": (rank,), "q_b_proj": (queries, rank)}
    return query | {
        "kv_a_proj_with_mqa": (config.latent_width, hidden),
        "kv_a_layernorm": (config.kv_lora_rank,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj": (hidden, heads * config.v_head_dim),
    }


def _moe(config: ModelConfig) -> dict[str, Shape]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    tensors: dict[str, Shape] = {"gate": (config.n_routed_experts, hidden)}
    for expert in range(config.n_routed_experts):
        tensors |= {f"experts.{expert}.{name}": shape for name, shape in _mlp(hidden, width).items()}
    if config.n_shared_experts:
        shared = _mlp(hidden, width * config.n_shared_experts)
        tensors |= {f"shared_experts.{name}": shape for name, shape in shared.items()}
    return tensors


def _mlp(hidden: int, width: int) -> dict[str, Shape]:
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
