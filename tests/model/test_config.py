"""config.json: the released shapes are read as published, and whatever cannot be served is refused by name."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

from model.config import ConfigError, ModelConfig, parse_config, read_config
from model.tensors import expected_tensors
from tests.checkpoints import SHAPES
from tests.model.shapes import V2, V2_5, V2_LITE, YARN


def parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` as newer transformers writes it."""
    scaling = dict(raw["rope_scaling"])
    kind = scaling.pop("type")
    kept = {name: value for name, value in raw.items() if name not in ("rope_scaling", "rope_theta")}
    return kept | {"rope_parameters": scaling | {"rope_type": kind, "rope_theta": raw["rope_theta"]}}


@pytest.mark.parametrize(("raw", "published"), [(V2, 235.7e9), (V2_5, 235.7e9), (V2_LITE, 15.7e9)])
def test_released_shape_has_its_published_size(raw: dict[str, Any], published: float) -> None:
    assert parameters(parse_config(raw)) == pytest.approx(published, abs=0.05e9)


def test_v2_is_read_field_by_field() -> None:
    config = parse_config(V2)
    unchanged = V2.keys() & ModelConfig.__dataclass_fields__.keys() - {"rope_scaling"}
    assert len(unchanged) == 26
    for name in unchanged:
        assert getattr(config, name) == V2[name], name
    assert config.eos_token_ids == (100001,)
    assert config.dtype == "bfloat16"
    assert config.moe_layers == tuple(range(1, 60))
    assert (config.qk_head_dim, config.latent_width) == (192, 576)
    assert config.rope_scaling is not None
    for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings"):
        assert getattr(config.rope_scaling, name) == YARN[name], name


def test_v2_lite_has_full_queries_and_plain_greedy_routing() -> None:
    config = parse_config(V2_LITE)
    assert config.q_lora_rank is None
    assert (config.topk_method, config.n_group, config.topk_group) == ("greedy", 1, 1)
    assert config.moe_layers == tuple(range(1, 27))


@pytest.mark.parametrize(("raw", "numbers"), [(V2, 34_560), (V2_LITE, 15_552)])
def test_cached_numbers_a_token_are_table_1s(raw: dict[str, Any], numbers: int) -> None:
    config = parse_config(raw)
    assert config.latent_width * config.num_hidden_layers == numbers


@pytest.mark.parametrize("raw", [V2, V2_5, V2_LITE])
def test_both_forms_of_rope_settings_give_the_same_config(raw: dict[str, Any]) -> None:
    assert parse_config(rope_parameters(raw)) == parse_config(raw)


def test_rope_theta_inside_rope_parameters_is_used() -> None:
    raw = rope_parameters(V2)
    raw["rope_parameters"]["rope_theta"] = 50000.0
    assert parse_config(raw).rope_theta == 50000.0


@pytest.mark.parametrize("plain", [{"rope_scaling": None}, {"rope_scaling": {"type": "default"}}])
def test_plain_rope_has_no_scaling(plain: dict[str, Any]) -> None:
    config = parse_config(V2 | plain)
    assert config.rope_scaling is None
    assert config.rope_theta == 10000.0


def test_groups_are_ignored_under_greedy_routing() -> None:
    config = parse_config(V2 | {"topk_method": "greedy", "n_group": 7, "topk_group": 9})
    assert (config.n_group, config.topk_group) == (1, 1)


@pytest.mark.parametrize(
    ("dense", "frequency", "layers"), [(0, 1, range(6)), (2, 1, range(2, 6)), (1, 2, (2, 4)), (6, 1, ())]
)
def test_moe_layers_follow_first_dense_and_frequency(dense: int, frequency: int, layers: Any) -> None:
    raw = V2 | {"num_hidden_layers": 6, "first_k_dense_replace": dense, "moe_layer_freq": frequency}
    assert parse_config(raw).moe_layers == tuple(layers)


@pytest.mark.parametrize(("given", "read"), [(7, (7,)), ([7, 9], (7, 9)), (None, ())])
def test_end_tokens_are_one_or_several_or_none(given: object, read: tuple[int, ...]) -> None:
    assert parse_config(V2 | {"eos_token_id": given}).eos_token_ids == read


@pytest.mark.parametrize(
    ("raw", "scale"),
    [
        (V2, 0.114721),
        (V2_LITE, 0.114721),
        (V2_5, 0.135234),
        (V2 | {"rope_scaling": None}, 192**-0.5),
        (V2 | {"rope_scaling": YARN | {"mscale_all_dim": 0}}, 192**-0.5),
        (V2 | {"rope_scaling": YARN | {"factor": 1}}, 192**-0.5),
    ],
)
def test_softmax_scale_carries_the_yarn_gain_squared(raw: dict[str, Any], scale: float) -> None:
    assert parse_config(raw).softmax_scale == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_softmax_scale_is_transformers(shape: str) -> None:
    config = DeepseekV2Config(**SHAPES[shape])
    ours = parse_config(config.to_dict() | {"architectures": ["DeepseekV2ForCausalLM"]})
    assert ours.softmax_scale == pytest.approx(DeepseekV2Attention(config, 0).scaling, rel=1e-9)


REQUIRED = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
]


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_field_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} is missing; expected"):
        parse_config({name: value for name, value in V2.items() if name != field})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "12", [12]])
@pytest.mark.parametrize("field", [*REQUIRED, "q_lora_rank", "n_group", "topk_group", "moe_layer_freq"])
def test_size_that_is_no_positive_integer_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} is .*; expected an integer of at least 1$"):
        parse_config(V2 | {field: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 10**400, True, "1"], ids=range(7))
@pytest.mark.parametrize("field", ["routed_scaling_factor", "rms_norm_eps", "rope_theta"])
def test_number_that_is_not_finite_and_positive_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} is .*; expected a finite number above 0$"):
        parse_config(V2 | {field: value})


@pytest.mark.parametrize("field", ["norm_topk_prob", "tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_flag_that_is_no_boolean_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} is 'yes'; expected true or false$"):
        parse_config(V2 | {field: "yes"})


def yarn(**changes: object) -> dict[str, Any]:
    return {"rope_scaling": YARN | changes}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"architectures": ["LlamaForCausalLM"]}, "architectures", "DeepseekV2ForCausalLM"),
    ({"architectures": None}, "architectures", "DeepseekV2ForCausalLM"),
    ({"model_type": "deepseek_v3"}, "model_type", "'deepseek_v2'"),
    ({"hidden_act": "gelu"}, "hidden_act", "'silu'"),
    ({"scoring_func": "sigmoid"}, "scoring_func", "'softmax'"),
    ({"attention_bias": True}, "attention_bias", "false"),
    ({"mlp_bias": True}, "mlp_bias", "false"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "an unquantised checkpoint"),
    ({"topk_method": "noaux_tc"}, "topk_method", "'greedy' or 'group_limited_greedy'"),
    ({"n_group": None, "topk_group": None}, "n_group", "it in config.json"),
    ({"topk_group": None}, "topk_group", "it in config.json"),
    ({"n_group": 7}, "n_group", "a divisor of n_routed_experts (160)"),
    ({"topk_group": 9}, "topk_group", "at most n_group (8)"),
    ({"num_experts_per_tok": 61}, "num_experts_per_tok", "at most 60"),
    ({"topk_method": "greedy", "num_experts_per_tok": 161}, "num_experts_per_tok", "at most 160"),
    ({"n_shared_experts": -1}, "n_shared_experts", "an integer of at least 0"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace", "an integer of at least 0"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim", "an even number"),
    ({"num_key_value_heads": 8}, "num_key_value_heads", "num_attention_heads (128)"),
    ({"bos_token_id": 102400}, "bos_token_id", "a token id below 102400"),
    ({"eos_token_id": -1}, "eos_token_id", "a token id below 102400"),
    ({"eos_token_id": [1, 102400]}, "eos_token_id", "a token id below 102400"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype", "'float32' or 'float16' or 'bfloat16'"),
    ({"dtype": "int8"}, "dtype", "'float32' or 'float16' or 'bfloat16'"),
    ({"rope_scaling": "yarn"}, "rope_scaling", "an object or null"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_scaling and rope_parameters", "one of them"),
    (yarn(type="linear"), "rope_scaling.type", "'default' or 'yarn'"),
    (yarn(rope_type="dynamic"), "rope_scaling.rope_type", "'default' or 'yarn'"),
    (yarn() | {"rope_theta": 1}, "rope_theta", "more than 1"),
    (yarn(rope_theta=1.0), "rope_scaling.rope_theta", "more than 1"),
    (yarn(factor=None), "rope_scaling.factor", "it in config.json"),
    (yarn(factor=0.5), "rope_scaling.factor", "at least 1"),
    (yarn(beta_fast=0.5), "rope_scaling.beta_fast", "at least beta_slow"),
    (yarn(mscale="large"), "rope_scaling.mscale", "a finite number above 0"),
    (yarn(mscale_all_dim=-1), "rope_scaling.mscale_all_dim", "a finite number above 0"),
    (yarn(original_max_position_embeddings=0), "rope_scaling.original_max_position_embeddings", "at least 1"),
    (yarn(attention_factor=1.5), "rope_scaling.attention_factor", "mscale"),
    (yarn(truncate=False), "rope_scaling.truncate", "true"),
]


@pytest.mark.parametrize(
    ("changes", "field", "expected"), REFUSED, ids=[f"{field}-{index}" for index, (_, field, _) in enumerate(REFUSED)]
)
def test_unsupported_or_contradictory_value_is_named(changes: dict[str, Any], field: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(V2 | changes)
    message = str(refused.value)
    assert message.startswith(f"{field} ")
    assert expected in message.partition("expected ")[2]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff"])
def test_config_file_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json (cannot be read as JSON|holds a JSON list)"):
        read_config(tmp_path)


def test_absent_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist: give the directory"):
        read_config(tmp_path)
