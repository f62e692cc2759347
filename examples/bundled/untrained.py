"""`python -m examples.bundled.untrained DIR`: the bundled model before it learned anything, to train from.

A DeepSeek-V2 of 1.9 million numbers: a low-rank query, a latent of 64 + 32 numbers a token and layer, one dense layer,
then 16 routed experts in 4 groups beside a shared one, 4 of them a token out of 2 groups.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.bundled.tokenizer import VOCABULARY_SIZE, write_companions
from model.config import parse_config
from model.export import export_checkpoint
from model.safetensors_header import CheckpointError
from model.tensors import expected_tensors

SEED = 2405_04434  # the DeepSeek-V2 paper's number
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 32,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "rope_scaling": None,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
"""config.json. Questions are short, and what matters is which letter is how far away: hence the rotary speeds."""
SHARED = 2.0  # how much larger what all embeddings have in common is than what each has alone


def write_untrained(out: Path | str, seed: int = SEED) -> Path:
    """Write the checkpoint to `out`, the same bytes for a seed; raises CheckpointError when `out` is in use."""
    with tempfile.TemporaryDirectory() as scratch:
        write_companions(Path(scratch))
        return export_checkpoint(out, CONFIG, _weights(seed), Path(scratch))


def _weights(seed: int) -> Iterator[tuple[str, Tensor]]:
    """Each matrix keeps the size of what it is given; those that add to the residual stream share its growth.

    There are no biases, so a head that looks for a distance alone needs something that all tokens have in common.
    """
    generator = torch.Generator().manual_seed(seed)
    config = parse_config(CONFIG)
    for name, shape in expected_tensors(config).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
            continue
        std = shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= (2 * config.num_hidden_layers) ** -0.5
        tensor = torch.empty(shape).normal_(std=std, generator=generator)
        if name == "model.embed_tokens.weight":
            tensor += torch.empty(shape[-1]).normal_(std=SHARED * std, generator=generator)
        yield name, tensor


def main() -> int:
    """Command line."""
    if len(sys.argv) != 2:
        print("usage: python -m examples.bundled.untrained DIR", file=sys.stderr)
        return 2
    try:
        print(f"wrote {write_untrained(sys.argv[1])}")
    except CheckpointError as error:
        print(f"untrained: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
