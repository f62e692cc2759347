"""A small random DeepSeek-V2 whose tokens are words, for tests that need text in many tokens and no sense.

Its shape is a miniature of V2's: 16 routed experts in 4 groups, 4 of them a token out of 2 groups, the real
latent of 512 + 64 numbers. It prints words, in no sensible order.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from examples.bundled.untrained import CONFIG
from model.chat_template import DEFAULT
from model.config import parse_config
from model.export import export_checkpoint
from model.tensors import expected_tensors
from model.tokenizer import byte_alphabet

SEED = 2405_04434  # the DeepSeek-V2 paper's number
BOS, EOS = "<|begin_of_sentence|>", "<|end_of_sentence|>"
WORDS = """
a above all along among an and are around as at away back be before below between blue bright by calm coast cold
coral current dark dawn deep drift dusk each eel far fast few fin fish float flow foam follow for from gather give
glow green grey gull hide high home in into is island it keep kelp last light like long low many moon more move
near never night no north not now ocean of off old on one open or other our out over pale pass pearl quick quiet
rain ray reef rest rise river rock round run sail salt sand scale school sea seal shadow shallow shark shell shine
ship shoal shore silver sky slow small soft some song south splash squid star still stone storm stream sun swell
swift swim tail than that the their them then there they through tide to together turn two under up wake warm was
water wave we west whale where which while white wide wild wind with world you
"""


def words_config() -> dict[str, Any]:
    """config.json."""
    return CONFIG | {
        "vocab_size": len(_vocabulary()) + 2,
        "hidden_size": 256,
        "intermediate_size": 704,
        "moe_intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "routed_scaling_factor": 1.0,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
    }


def write_words(out: Path | str) -> Path:
    """Write the checkpoint to `out`, the same bytes every time."""
    with tempfile.TemporaryDirectory() as scratch:
        companions = Path(scratch)
        _tokenizer().save(str(companions / "tokenizer.json"))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "chat_template": DEFAULT,
        }
        (companions / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        (companions / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_p": 0.95}) + "\n")
        return export_checkpoint(out, words_config(), _weights(), companions)


def _weights() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = _vocabulary()
    for name, shape in expected_tensors(parse_config(words_config())).items():
        tensor = torch.empty(shape).normal_(std=shape[-1] ** -0.5, generator=generator)
        if name.endswith("norm.weight"):
            tensor = torch.ones(shape)
        elif name == "lm_head.weight":
            tensor *= 6.0  # a likely next word, as trained models have
            words = torch.tensor([vocabulary["Ġ" + word] for word in WORDS.split()])
            tensor = torch.zeros(shape).index_copy_(0, words, tensor[words])  # whole words only
        yield name, tensor


def _vocabulary() -> dict[str, int]:
    """256 bytes, then every prefix that leads to a word with its leading space; ids from 2."""
    names = list(byte_alphabet())
    known = set(names)
    for word in WORDS.split():
        text = "Ġ" + word
        for end in range(2, len(text) + 1):
            if text[:end] not in known:
                known.add(text[:end])
                names.append(text[:end])
    return {name: 2 + index for index, name in enumerate(names)}


def _tokenizer() -> Tokenizer:
    vocabulary = _vocabulary()
    merges = [(name[:-1], name[-1]) for name in vocabulary if len(name) > 1]
    tokenizer = Tokenizer(BPE(vocab={BOS: 0, EOS: 1} | vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS)])
    return tokenizer
