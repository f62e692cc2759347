"""Latent attention against loops over the paper's formulas, and its two forms against each other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding

from attention.absorbed import AbsorbedAttention
from attention.batch import StepBatch
from attention.cache import LatentCache
from attention.mla import expanded_attention, load_mla_weights
from attention.rope import RotaryTable
from kernels.rotary import rotate
from model.checkpoint import Checkpoint
from tests.checkpoints import SHAPES

TOKENS = 37
LAYER = 1
BLOCK = 8


def hidden_states() -> torch.Tensor:
    return torch.randn(TOKENS, 256, generator=torch.Generator().manual_seed(11))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.double() * x / torch.sqrt((x * x).mean() + 1e-6)


def turned(x_R: torch.Tensor, position: int, frequencies: torch.Tensor) -> torch.Tensor:
    """Each pair (2i, 2i+1) as a complex number, times exp(j · position · frequency)."""
    out = torch.empty_like(x_R)
    for pair, frequency in enumerate(frequencies):
        angle = torch.tensor(position * float(frequency), dtype=torch.float64)
        a, b = x_R[2 * pair], x_R[2 * pair + 1]
        out[2 * pair] = a * angle.cos() - b * angle.sin()
        out[2 * pair + 1] = a * angle.sin() + b * angle.cos()
    return out


def oracle_frequencies(shape: str) -> tuple[torch.Tensor, float]:
    """transformers' inverse frequencies and the factor on cos and sin."""
    rotary = DeepseekV2RotaryEmbedding(DeepseekV2Config(**SHAPES[shape]))
    return rotary.inv_freq.double(), float(rotary.attention_scaling)


def slow_attention(opened: Checkpoint, shape: str, x_TD: torch.Tensor) -> torch.Tensor:
    """Equations 9-19 and 37-47, a token, a head and a key at a time, in float64."""
    config = opened.config
    frequencies, gain = oracle_frequencies(shape)

    def read(name: str) -> torch.Tensor:
        return opened.tensor(f"model.layers.{LAYER}.self_attn.{name}.weight").double()

    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    queries, keys, values = [], [], []
    for position, x in enumerate(x_TD.double()):
        if config.q_lora_rank is None:
            q = read("q_proj") @ x
        else:
            q = read("q_b_proj") @ norm(read("q_a_proj") @ x, read("q_a_layernorm"))
        both = read("kv_a_proj_with_mqa") @ x
        latent = norm(both[: config.kv_lora_rank], read("kv_a_layernorm"))
        shared = gain * turned(both[config.kv_lora_rank :], position, frequencies)
        kv = (read("kv_b_proj") @ latent).view(heads, nope + value)
        per_head = q.view(heads, -1)
        queries.append([torch.cat((h[:nope], gain * turned(h[nope:], position, frequencies))) for h in per_head])
        keys.append([torch.cat((h[:nope], shared)) for h in kv])
        values.append([h[nope:] for h in kv])
    out = torch.zeros_like(x_TD, dtype=torch.float64)
    for t in range(len(x_TD)):
        mixed = []
        for head in range(heads):
            scores = torch.stack([queries[t][head] @ keys[s][head] for s in range(t + 1)]) * config.softmax_scale
            weights = torch.exp(scores - scores.max())
            weights /= weights.sum()
            mixed.append(sum(w * values[s][head] for s, w in enumerate(weights)))
        out[t] = read("o_proj") @ torch.cat(mixed)  # type: ignore[arg-type]
    return out


def absorbed(opened: Checkpoint, x_TD: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """The serving path over a paged cache whose blocks lie in no order, computed in chunks."""
    config = opened.config
    attention = AbsorbedAttention(opened, LAYER, torch.float32, "cpu")
    blocks = torch.randperm(16, generator=torch.Generator().manual_seed(5))[: -(-len(x_TD) // BLOCK)].tolist()
    cache = LatentCache(config, 16, BLOCK)
    rotary = RotaryTable(config, 128)
    out, start = [], 0
    for count in chunks:
        position_T = torch.arange(start, start + count, dtype=torch.int32)
        cos, sin = rotary.at(position_T)
        batch = StepBatch(
            token_T=torch.zeros(count, dtype=torch.int64),
            position_T=position_T,
            sequence_T=torch.zeros(count, dtype=torch.int32),
            slot_T=torch.tensor([blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, start + count)]),
            block_tables_QM=torch.tensor([blocks], dtype=torch.int32),
            logit_row_L=torch.zeros(0, dtype=torch.int64),
            cos_TR=cos,
            sin_TR=sin,
        )
        out.append(attention(x_TD[start : start + count], torch.zeros(count, x_TD.shape[1]), batch, cache))
        start += count
    return torch.cat(out)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_both_forms_match_the_paper(checkpoint: Callable[[str], Path], shape: str) -> None:
    opened = Checkpoint.open(checkpoint(shape))
    x_TD = hidden_states()
    expected = slow_attention(opened, shape, x_TD)
    weights = load_mla_weights(opened, LAYER)
    expanded = expanded_attention(weights, opened.config, x_TD[None], RotaryTable(opened.config, 128))[0]
    assert torch.allclose(expanded.double(), expected, atol=1e-5)
    assert torch.allclose(absorbed(opened, x_TD, [TOKENS]).double(), expected, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * TOKENS, [5, 16, 3, 13], [36, 1], [8, 8, 8, 8, 5]])
def test_chunks_change_no_bit(checkpoint: Callable[[str], Path], chunks: list[int]) -> None:
    opened = Checkpoint.open(checkpoint("tiny"))
    whole = absorbed(opened, hidden_states(), [TOKENS])
    assert torch.equal(absorbed(opened, hidden_states(), chunks), whole)


@pytest.mark.parametrize("shape", ["tiny", "tiny-yarn"])
def test_rotation_is_that_of_transformers(checkpoint: Callable[[str], Path], shape: str) -> None:
    config = Checkpoint.open(checkpoint(shape)).config
    positions = torch.tensor([0, 1, 63, 64, 500, 2559])
    x = torch.randn(6, config.qk_rope_head_dim, generator=torch.Generator().manual_seed(2))
    turns = DeepseekV2RotaryEmbedding(DeepseekV2Config(**SHAPES[shape]))(x, positions[None])[0]
    expected = torch.view_as_real(torch.view_as_complex(x.view(6, -1, 2)) * turns).flatten(1)
    cos, sin = RotaryTable(config, 2560).at(positions)
    assert torch.allclose(rotate(x, cos, sin), expected, atol=2e-6)


def test_the_cache_holds_576_numbers_a_token_a_layer(checkpoint: Callable[[str], Path]) -> None:
    config = Checkpoint.open(checkpoint("tiny")).config
    cache = LatentCache(config, blocks=3, block_size=BLOCK)
    assert cache.nbytes == 4 * 576 * 3 * BLOCK * config.num_hidden_layers
