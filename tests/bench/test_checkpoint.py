"""The checkpoint that is measured: the right tensors, for Shoal and for transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.checkpoint import SHAPES, VOCABULARY, draw_weights, ensure_checkpoint, make_tokenizer, write_checkpoint
from model.checkpoint import Checkpoint
from model.config import parse_config
from model.tensors import expected_tensors
from model.tokenizer import Detokenizer, Tokenizer
from tests import oracle

MINIATURE: Mapping[str, Any] = SHAPES["bench"] | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MINIATURE, tmp_path_factory.mktemp("bench") / "miniature")


def test_names_and_shapes_are_what_the_model_asks_for() -> None:
    drawn = {name: tuple(tensor.shape) for name, tensor in draw_weights(MINIATURE)}
    assert drawn == expected_tensors(parse_config(MINIATURE))


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_measured_shapes_have_855_million_parameters(shape: str) -> None:
    tensors = expected_tensors(parse_config(SHAPES[shape]))
    assert round(sum(torch.Size(size).numel() for size in tensors.values()) / 1e6) == 855


def test_weights_have_their_deviations_and_are_always_the_same() -> None:
    weights, again = dict(draw_weights(MINIATURE)), dict(draw_weights(MINIATURE))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert abs(float(weights["model.layers.1.mlp.gate.weight"].std()) - 0.05) < 0.01
    assert abs(float(weights["model.embed_tokens.weight"].std()) - 0.02) < 0.001
    assert torch.equal(weights["model.norm.weight"], torch.ones(32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_dtype_that_the_config_names(dtype: torch.dtype) -> None:
    config = MINIATURE | {"torch_dtype": str(dtype).removeprefix("torch.")}
    assert {tensor.dtype for _, tensor in draw_weights(config)} == {dtype}


def test_shoal_and_transformers_open_it(miniature: Path) -> None:
    assert Checkpoint.open(miniature).config.n_routed_experts == 8
    assert oracle.logits(miniature, [2, 300, 8000]).shape == (3, VOCABULARY)


def test_every_token_that_can_be_drawn_is_whole_text(miniature: Path) -> None:
    tokenizer = Tokenizer.load(miniature)
    head = Checkpoint.open(miniature).tensor("lm_head.weight")
    drawn = [token for token in range(VOCABULARY) if bool(head[token].any())]
    assert len(drawn) == VOCABULARY - 2 - 128
    detokenizer = Detokenizer(tokenizer)
    assert all(detokenizer.push(token) for token in drawn)


def test_the_tokenizer_fills_the_vocabulary_and_reads_what_it_writes() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert tokenizer.decode(tokenizer.encode(" sea tide é").ids) == " sea tide é"


def test_what_is_there_is_not_written_again(miniature: Path) -> None:
    before = (miniature / "config.json").stat().st_mtime_ns
    assert ensure_checkpoint(miniature) == miniature
    assert (miniature / "config.json").stat().st_mtime_ns == before
