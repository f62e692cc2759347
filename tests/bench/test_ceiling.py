"""The ceiling counts what one token of a prompt is multiplied with, as torch counts it in transformers' model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.ceiling import measure_ceiling
from model.config import read_config
from model.tensors import expected_tensors
from tests.oracle import load


@pytest.mark.parametrize("shape", ["tiny", "mini"])
def test_a_tokens_products_are_those_of_transformers(checkpoint: Callable[[str], Path], shape: str) -> None:
    path = checkpoint(shape)
    config = read_config(path)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        load(path)(torch.tensor([[5]]))
    head = 2 * config.vocab_size * config.hidden_size
    scores = 2 * config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    norms = 2 * sum(shape[0] for shape in expected_tensors(config).values() if len(shape) == 1)  # a scale, no product
    expected = counter.get_total_flops() - head - scores + norms
    ceiling = measure_ceiling(config)
    assert ceiling.token_gflop == pytest.approx(1e-9 * expected)
    assert ceiling.tokens_per_s == pytest.approx(ceiling.product_gflops / ceiling.token_gflop)
