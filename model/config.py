"""A DeepSeek-V2 model's shape, read from Hugging Face's config.json and checked field by field."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.config_fields import ConfigError, Fields
from model.json_file import read_object
from model.rope_fields import RopeScaling, read_rope

__all__ = ["ConfigError", "ModelConfig", "RopeScaling", "parse_config", "read_config"]

ARCHITECTURE = "DeepseekV2ForCausalLM"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Field names are config.json's; sizes are counts of numbers, not bytes."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    moe_layer_freq: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    topk_method: str
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Numbers cached a token a layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times g(mscale_all_dim)^2 under YaRN (released code)."""
        scale = math.pow(self.qk_head_dim, -0.5)
        yarn = self.rope_scaling
        if yarn is not None and yarn.mscale_all_dim and yarn.factor > 1:
            scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1.0) ** 2
        return scale

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe(layer))

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


def read_config(directory: Path) -> ModelConfig:
    """Read `directory`/config.json; raises ConfigError (a ValueError) that names what is wrong."""
    return parse_config(read_raw_config(directory))


def read_raw_config(directory: Path) -> dict[str, object]:
    """config.json as it stands."""
    absent = "give the directory of a Hugging Face checkpoint"
    return read_object(Path(directory) / "config.json", ConfigError, absent)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Check every field that changes the arithmetic; raises ConfigError naming field, value and expectation."""
    fields = Fields(raw)
    _check_supported(raw, fields)
    layers = fields.size("num_hidden_layers")
    dense = fields.size("first_k_dense_replace", default=0, least=0)
    frequency = fields.size("moe_layer_freq", default=1)
    has_moe = any(layer >= dense and layer % frequency == 0 for layer in range(layers))
    experts = fields.size("n_routed_experts") if has_moe else fields.size("n_routed_experts", default=0, least=0)
    method = fields.choice("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
    one_group = None if has_moe and method == "group_limited_greedy" else 1
    groups = fields.size("n_group", default=one_group)
    kept_groups = fields.size("topk_group", default=one_group)
    chosen = fields.size("num_experts_per_tok") if has_moe else fields.size("num_experts_per_tok", default=0, least=0)
    if has_moe:
        _check_routing(method, experts, groups, kept_groups, chosen)
    rope_dim = fields.size("qk_rope_head_dim")
    if rope_dim % 2:
        raise ConfigError(f"qk_rope_head_dim is {rope_dim}; expected an even number, rotated in pairs")
    heads = fields.size("num_attention_heads")
    if fields.size("num_key_value_heads", default=heads) != heads:
        raise ConfigError(
            f"num_key_value_heads is {raw['num_key_value_heads']}; expected num_attention_heads ({heads}): "
            "latent attention has one latent for all heads"
        )
    theta, scaling = read_rope(raw)
    vocabulary = fields.size("vocab_size")
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=fields.size("hidden_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=fields.size("intermediate_size"),
        moe_intermediate_size=fields.size("moe_intermediate_size") if has_moe else 0,
        n_routed_experts=experts,
        n_shared_experts=fields.size("n_shared_experts", default=0, least=0),
        num_experts_per_tok=chosen,
        first_k_dense_replace=dense,
        moe_layer_freq=frequency,
        q_lora_rank=fields.size("q_lora_rank") if raw.get("q_lora_rank") is not None else None,
        kv_lora_rank=fields.size("kv_lora_rank"),
        qk_nope_head_dim=fields.size("qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=fields.size("v_head_dim"),
        topk_method=method,
        n_group=groups if method == "group_limited_greedy" else 1,
        topk_group=kept_groups if method == "group_limited_greedy" else 1,
        routed_scaling_factor=fields.number("routed_scaling_factor", default=1.0),
        norm_topk_prob=fields.flag("norm_topk_prob", default=False),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=fields.size("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        bos_token_id=fields.token("bos_token_id", vocabulary),
        eos_token_ids=fields.tokens("eos_token_id", vocabulary),
        dtype=fields.choice(
            "dtype" if "dtype" in raw else "torch_dtype", ("float32", "float16", "bfloat16"), default="float32"
        ),
    )


def _check_supported(raw: Mapping[str, object], fields: Fields) -> None:
    architectures = raw.get("architectures")
    if architectures != [ARCHITECTURE]:
        raise ConfigError(f"architectures is {architectures!r}; expected ['{ARCHITECTURE}']: no other is served")
    fields.choice("model_type", ("deepseek_v2",), default="deepseek_v2")
    fields.choice("hidden_act", ("silu",), default="silu")
    fields.choice("scoring_func", ("softmax",), default="softmax")
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name, default=False):
            raise ConfigError(f"{name} is true; expected false: DeepSeek-V2 has no biases")
    if raw.get("quantization_config") is not None:
        raise ConfigError("quantization_config is set; expected an unquantised checkpoint: convert it first")


def _check_routing(method: str, experts: int, groups: int, kept_groups: int, chosen: int) -> None:
    allowed = experts
    if method == "group_limited_greedy":
        if experts % groups:
            raise ConfigError(f"n_group is {groups}; expected a divisor of n_routed_experts ({experts})")
        if kept_groups > groups:
            raise ConfigError(f"topk_group is {kept_groups}; expected at most n_group ({groups})")
        allowed = experts // groups * kept_groups
    if chosen > allowed:
        raise ConfigError(
            f"num_experts_per_tok is {chosen}; expected at most {allowed}, the experts that {method} may choose from"
        )
