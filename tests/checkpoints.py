"""Seeded random DeepSeek-V2 checkpoints, written by transformers: the independent oracle of these tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

V2_LIKE: dict[str, Any] = {
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "q_lora_rank": 128,
}
LITE_LIKE: dict[str, Any] = {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "q_lora_rank": None}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 64,
}
BASE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
MINI: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "max_position_embeddings": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": BASE | V2_LIKE,
    "tiny-lite": BASE | LITE_LIKE,
    "tiny-yarn": BASE | V2_LIKE | {"rope_parameters": YARN, "max_position_embeddings": 2560},
}
LEAST: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "q_lora_rank": 16,
}
EVERY_SHAPE = SHAPES | {"mini": BASE | V2_LIKE | MINI, "least": BASE | V2_LIKE | MINI | LEAST}
"""The smallest ones, for training and for interpreted kernels, have no tokens for some of the other tests' prompts."""


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk and how it was drawn."""

    path: Path
    shape: dict[str, Any]


def write_checkpoint(shape: dict[str, Any], out: Path, seed: int = 0) -> Written:
    """Write model.safetensors, config.json and a byte-level BPE tokenizer in Hugging Face's layout to `out`."""
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):  # zero from transformers: every token would tie
                parameter.normal_(std=0.05)
            elif name.endswith("norm.weight"):  # all ones would hide a norm applied with the wrong weight
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out)
    write_tokenizer(out, shape["vocab_size"])
    return Written(out, shape)


def write_tokenizer(out: Path, vocab_size: int) -> None:
    """Train a byte-level BPE on the oracle's own source text, with `<bos>` 0 and `<eos>` 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train(
        [__file__],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<bos>", "<eos>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
