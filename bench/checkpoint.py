"""`python -m bench.checkpoint SHAPE DIR`: a random DeepSeek-V2 of 855 M parameters, to measure on.

Speed does not ask what the weights say, only that the router spreads tokens over its experts as a trained one does
and that numbers stay ordinary: weights are normal with a deviation of 0.02, the router's with 0.05. Every token that
can be generated is whole text, so that each makes one event of an HTTP stream.
"""

import json
import string
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from bench.errors import BenchError
from model.chat_template import DEFAULT
from model.config import parse_config
from model.export import export_checkpoint
from model.safetensors_header import CheckpointError
from model.tensors import expected_tensors
from model.tokenizer import byte_alphabet

SEED = 2405_04434
SHARD_BYTES = 512 * 1024 * 1024
DEVIATION, ROUTER_DEVIATION = 0.02, 0.05
VOCABULARY = 8192
BOS, EOS = "<bos>", "<eos>"

_BENCH: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 352,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 384,
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
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
_GROUPED = {"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "bench": _BENCH,
    "bench-bf16": _BENCH | {"torch_dtype": "bfloat16"},
    "bench-v2": _BENCH | _GROUPED,
}
"""config.json by name: V2-Lite's greedy routing, the same in bf16, and V2's device-limited routing."""


def write_checkpoint(config: Mapping[str, Any], out: Path) -> Path:
    """Write random weights and a tokenizer to `out`, a shard in memory at a time; the same bytes every time.

    Raises CheckpointError when `out` is in use.
    """
    with tempfile.TemporaryDirectory() as scratch:
        companions = Path(scratch)
        make_tokenizer().save(str(companions / "tokenizer.json"))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "chat_template": DEFAULT,
        }
        (companions / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        return export_checkpoint(out, config, draw_weights(config), companions, SHARD_BYTES)


def draw_weights(config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the config asks for, in its dtype and in the order of the layers."""
    generator = torch.Generator().manual_seed(SEED)
    parsed = parse_config(config)
    dtype: torch.dtype = getattr(torch, parsed.dtype)
    for name, shape in expected_tensors(parsed).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=dtype)
            continue
        deviation = ROUTER_DEVIATION if name.endswith("mlp.gate.weight") else DEVIATION
        tensor = torch.empty(shape).normal_(std=deviation, generator=generator)
        if name == "lm_head.weight":
            tensor[_never_drawn()] = 0.0  # never the likeliest of thousands
        yield name, tensor.to(dtype)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE: special tokens, 256 bytes, then a space and one, two and three letters."""
    vocabulary = _vocabulary()
    merges = [(name[:-1], name[-1]) for name in vocabulary if len(name) > 1]
    tokenizer = Tokenizer(BPE(vocab={BOS: 0, EOS: 1} | vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS)])
    return tokenizer


def _vocabulary() -> dict[str, int]:
    names = list(byte_alphabet())
    longest = ["Ġ"]
    for _ in range(3):
        longest = [name + letter for name in longest for letter in string.ascii_lowercase]
        names.extend(longest)
    return {name: 2 + index for index, name in enumerate(names[: VOCABULARY - 2])}


def _never_drawn() -> list[int]:
    """Special tokens, and bytes that are only parts of characters."""
    vocabulary = _vocabulary()
    return [0, 1, *(vocabulary[name] for name in byte_alphabet()[0x80:])]


def ensure_checkpoint(directory: Path) -> Path:
    """Write the `bench` checkpoint where the default one belongs, unless it is there already."""
    if (directory / "config.json").is_file():
        return directory
    try:
        return write_checkpoint(SHAPES["bench"], directory)
    except CheckpointError as error:
        raise BenchError(str(error)) from error


def main() -> int:
    """Command line."""
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        print(f"usage: python -m bench.checkpoint {{{','.join(SHAPES)}}} DIR", file=sys.stderr)
        return 2
    try:
        print(f"wrote {write_checkpoint(SHAPES[sys.argv[1]], Path(sys.argv[2]))}")
    except CheckpointError as error:
        print(f"bench.checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
