"""The least work of a token, against numbers that were added up by hand."""

from dataclasses import replace

import pytest

from bench.gpu_work import distinct_experts, step_bytes, token_flops
from bench.random_checkpoint import scaled_config, v2_lite_config

ATTENTION = 64 * 64 + 48 * 64 + 32 + 64 * 32 + 64 * 32  # q, kv_a, its norm, kv_b, o
NORMS = 3 * 2 * 64 + 64
FEED_FORWARD = 3 * 64 * 96 + 2 * (8 * 64 + 3 * 64 * 64)  # a dense layer; gates and shared experts
HEAD = 512 * 64
EXPERT = 3 * 64 * 32
DENSE = 3 * ATTENTION + NORMS + FEED_FORWARD + HEAD


def test_experts_that_a_batch_chooses() -> None:
    config = scaled_config()  # 2 of 8
    assert distinct_experts(config, 1) == 2
    assert distinct_experts(config, 2) == 3.5
    assert distinct_experts(v2_lite_config(), 128) == pytest.approx(64, abs=0.001)


@pytest.mark.parametrize(("batch", "experts"), [(1, 2.0), (2, 3.5)])
def test_a_step_reads_each_weight_once_and_every_latent(batch: int, experts: float) -> None:
    latents = batch * 10 * 3 * (32 + 16)
    numbers = DENSE + batch * 64 + 2 * experts * EXPERT + latents
    assert step_bytes(scaled_config(), batch, length=10) == 2 * numbers
    assert step_bytes(scaled_config(), batch, length=10, number_bytes=4) == 4 * numbers


def test_a_tied_head_is_read_once() -> None:
    config = scaled_config()
    tied = replace(config, tie_word_embeddings=True)
    assert step_bytes(tied, 1, 10) == step_bytes(config, 1, 10)
    assert token_flops(tied, 9) == token_flops(config, 9)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_prompts_token_meets_its_weights_and_the_keys_before_it(tokens: int) -> None:
    weights = DENSE - HEAD + 2 * 2 * EXPERT
    heads_of_layers, keys = 3 * 2, sum(range(1, tokens + 1)) / tokens
    expected = 2 * weights + 2 * HEAD / tokens + heads_of_layers * keys * 2 * (48 + 32)
    assert token_flops(scaled_config(), tokens) == pytest.approx(expected)


def test_lite_in_round_numbers() -> None:
    """Weights of 2.45 B a token without the embedding, 0.21 B of them in the head; and 31 KB of latents a token."""
    lite = v2_lite_config()
    assert step_bytes(lite, 1, 1024) - step_bytes(lite, 1, 1023) == 27 * 576 * 2
    assert token_flops(lite, 1024) == pytest.approx(2 * 2.24e9 + 27 * 16 * 512.5 * 2176, rel=0.01)
