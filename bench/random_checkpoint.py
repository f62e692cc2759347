"""Weights that are drawn when they are asked for, on the device that computes: a whole model without a file.

Speed does not ask what the weights say, only that the router spreads tokens over its experts as a trained one does and
that numbers stay ordinary: matrices are normal with a deviation of 0.02, the router's with 0.05, and norms are near 1.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, CheckpointError
from model.config import ModelConfig, parse_config
from model.tensors import Shape, expected_tensors

Size = Literal["v2-lite", "scaled"]
DEVIATION, ROUTER_DEVIATION, NORM_DEVIATION = 0.02, 0.05, 0.02
SEED_BYTES = 7  # of a name's digest: a generator's seed stays below 2^63

_V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "torch_dtype": "bfloat16",
}
_SCALED: dict[str, Any] = _V2_LITE | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_RAW: Mapping[Size, Mapping[str, Any]] = {"v2-lite": _V2_LITE, "scaled": _SCALED}


def raw_config(size: Size, layers: int | None = None) -> dict[str, Any]:
    """config.json of a size, its first `layers` layers alone if given; raises ValueError when it has fewer."""
    raw = dict(_RAW[size])
    most = raw["num_hidden_layers"]
    if layers is not None:
        if not 2 <= layers <= most:
            raise ValueError(f"{layers} layers given; expected 2 to {most}, of which the first has no experts")
        raw["num_hidden_layers"] = layers
    return raw


def v2_lite_config(layers: int | None = None) -> ModelConfig:
    """DeepSeek-V2-Lite's own shape."""
    return parse_config(raw_config("v2-lite", layers))


def scaled_config(layers: int | None = None) -> ModelConfig:
    """The same model, made so small that a test can compute it."""
    return parse_config(raw_config("scaled", layers))


@dataclass(frozen=True, slots=True, init=False)
class RandomCheckpoint(Checkpoint):
    """A Checkpoint without files. The same name and seed give the same numbers, in whatever order they are read."""

    device: str
    dtype: torch.dtype
    seed: int
    shapes: Mapping[str, Shape]

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype, seed: int) -> None:
        Checkpoint.__init__(self, Path("random"), config, {})
        for name, value in (("device", device), ("dtype", dtype), ("seed", seed), ("shapes", expected_tensors(config))):
            object.__setattr__(self, name, value)

    def tensors(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Draw tensors one at a time, in order; raises CheckpointError for an unknown name."""
        generator = torch.Generator(self.device)
        for name in names:
            shape = self.shapes.get(name)
            if shape is None:
                raise CheckpointError(f"a model of this shape has no tensor {name}")
            generator.manual_seed(self._seed_of(name))
            drawn = torch.empty(shape, dtype=self.dtype, device=self.device)
            if name.endswith("norm.weight"):
                yield drawn.normal_(1.0, NORM_DEVIATION, generator=generator)
            else:
                deviation = ROUTER_DEVIATION if name.endswith("mlp.gate.weight") else DEVIATION
                yield drawn.normal_(0.0, deviation, generator=generator)

    def _seed_of(self, name: str) -> int:
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=SEED_BYTES).digest()
        return int.from_bytes(digest, "little")
