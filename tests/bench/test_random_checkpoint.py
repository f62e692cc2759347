"""Weights without a file: what a decoder and a host ask for, the same every time."""

import math

import pytest
import torch

from bench.random_checkpoint import RandomCheckpoint, raw_config, scaled_config, v2_lite_config
from model.checkpoint import CheckpointError
from model.tensors import expected_tensors, expert_names
from services.footprint import by_kind

GATE = "model.layers.1.mlp.gate.weight"
NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def made(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> RandomCheckpoint:
    return RandomCheckpoint(scaled_config(), "cpu", dtype, seed)


def test_lite_has_its_15_7_billion_parameters() -> None:
    assert round(by_kind(v2_lite_config()).total() / 1e9, 1) == 15.7
    assert v2_lite_config().softmax_scale == pytest.approx(0.114721, abs=1e-6)


def test_fewer_layers_are_the_first_ones() -> None:
    assert v2_lite_config(4).moe_layers == (1, 2, 3)
    for layers in (1, 28):
        with pytest.raises(ValueError, match=f"{layers} layers given; expected 2 to 27"):
            raw_config("v2-lite", layers)


def test_every_tensor_of_the_model_has_its_shape_and_the_dtype() -> None:
    config = scaled_config()
    names = list(expected_tensors(config))
    drawn = dict(zip(names, made().tensors(names), strict=True))
    assert {name: tuple(tensor.shape) for name, tensor in drawn.items()} == expected_tensors(config)
    assert {tensor.dtype for tensor in drawn.values()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match=r"no tensor model.layers.3.input_layernorm"):
        made().tensor("model.layers.3.input_layernorm.weight")


def test_a_name_has_its_own_numbers_whatever_was_read_before() -> None:
    once, again = made(), made()
    again.tensor(NORM)
    assert torch.equal(once.tensor(QUERY), again.tensor(QUERY))
    assert not torch.equal(once.tensor(QUERY), made(seed=1).tensor(QUERY))
    assert not torch.equal(once.tensor(QUERY), once.tensor(QUERY.replace("layers.0", "layers.1")))


def test_experts_are_the_tensors_of_their_names() -> None:
    checkpoint = made()
    first, second = checkpoint.experts(2, (5, 0))
    gate, up, down = map(checkpoint.tensor, expert_names(2, 5))
    assert torch.equal(first.gate_proj, gate)
    assert torch.equal(first.up_proj, up)
    assert torch.equal(first.down_proj, down)
    assert not torch.equal(first.down_proj, second.down_proj)


def test_weights_have_their_deviations() -> None:
    checkpoint = made(dtype=torch.float32)
    assert float(checkpoint.tensor(QUERY).std()) == pytest.approx(0.02, rel=0.1)
    assert float(checkpoint.tensor(GATE).std()) == pytest.approx(0.05, rel=0.1)
    norm = checkpoint.tensor(NORM)
    assert math.isclose(float(norm.mean()), 1.0, abs_tol=0.02)
    assert 0.01 < float(norm.std()) < 0.03
