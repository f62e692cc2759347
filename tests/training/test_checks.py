"""What a recipe and a model cannot do together is refused before anything is started."""

from dataclasses import replace
from typing import Any

import pytest

from model.config import ModelConfig, parse_config
from services.training.checks import check_recipe
from services.training.recipe import parse_recipe
from services.training.result import with_yarn
from tests.checkpoints import LITE_LIKE, SHAPES

GROUPED = parse_config({"architectures": ["DeepseekV2ForCausalLM"], **SHAPES["tiny"]})
LITE = parse_config({"architectures": ["DeepseekV2ForCausalLM"], **SHAPES["tiny"], **LITE_LIKE})
SPARSE = replace(GROUPED, first_k_dense_replace=0, n_shared_experts=0)
DENSE = replace(GROUPED, first_k_dense_replace=GROUPED.num_hidden_layers)


def check(config: ModelConfig, **given: Any) -> None:
    raw = {"model": "m", "output_dir": "o", "data": {"files": ["d"], "sequence_length": 64}, "steps": 10}
    recipe = parse_recipe({**raw, **given})
    check_recipe(recipe, with_yarn(config, recipe.yarn))


@pytest.mark.parametrize(
    ("config", "given", "told"),
    [
        (DENSE, {}, "m has no routed experts"),
        (GROUPED, {"experts": {"hosts": 17}}, "experts.hosts is 17; expected at most 16"),
        (
            GROUPED,
            {"data": {"files": ["d"], "sequence_length": 8192}, "batch_tokens": 8192, "micro_batch_tokens": 8192},
            "data.sequence_length is 8192; the model's context has",
        ),
        (LITE, {"balance": {"device": 0.05}}, "device is 0.05, but the model routes all its experts as one group"),
        (LITE, {"balance": {"communication": 0.02}}, "communication is 0.02, but"),
        (LITE, {"drop_tokens": True}, "drop_tokens is true, but .* nothing would ever be dropped"),
        (GROUPED, {"method": "lora", "lora": {"targets": ["v_proj"]}}, "LoRA targets v_proj"),
        (
            SPARSE,
            {"method": "lora", "lora": {"targets": ["dense", "shared"]}},
            r"lora.targets is \['dense', 'shared'\], and this model has no such layers; expected some of experts, q_a_",
        ),
        (
            GROUPED,
            {"method": "lora", "lora": {"rank": 97}},
            "lora.rank is 97; expected at most 96, the shorter side of model.layers.1.mlp.shared_experts.gate_proj",
        ),
        (
            GROUPED,
            {"yarn": {"factor": 2, "original_max_position_embeddings": 4097}},
            "yarn.original_max_position_embeddings is 4097; expected at most 4096, the tokens of the model's own",
        ),
        (GROUPED, {"model": "o/model"}, "model is o/model, and the run would write its result to o/model;"),
        (GROUPED, {"model": "o/model/base"}, "model is o/model/base, and the run would write its result to o/model;"),
        (
            GROUPED,
            {"model": "o/initial", "init": "random"},
            "model is o/initial, and the run would write its first weights to o/initial; .* give another output_dir",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused(config: ModelConfig, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check(config, **given)


@pytest.mark.parametrize("method", ["full", "lora", "esft"])
def test_what_the_model_can_do_passes(method: str) -> None:
    check(GROUPED, method=method, balance={"expert": 0.003, "device": 0.05, "communication": 0.02}, drop_tokens=True)
    check(LITE, method=method, balance={"expert": 0.001})


def test_the_context_is_the_trained_models() -> None:
    lengths = {"data": {"files": ["d"], "sequence_length": 8192}, "batch_tokens": 8192, "micro_batch_tokens": 8192}
    check(GROUPED, yarn={"factor": 2, "original_max_position_embeddings": 4096}, **lengths)


@pytest.mark.parametrize(
    ("hidden_size", "hosts", "most"),
    [(5120, 1, 13107), (5120, 4, 52428), (64, 1, 262144)],  # 2^30 bytes in rows of fp32; 2^20 rows
)
def test_a_micro_batch_is_no_larger_than_what_a_host_can_answer(hidden_size: int, hosts: int, most: int) -> None:
    config = replace(GROUPED, hidden_size=hidden_size)
    given = {"experts": {"hosts": hosts}, "batch_tokens": 1 << 20}
    check(config, micro_batch_tokens=most, **given)
    with pytest.raises(ValueError, match=f"micro_batch_tokens is {most + 1}: .* use less, or more experts.hosts"):
        check(config, micro_batch_tokens=most + 1, **given)


def test_a_model_beside_what_is_written_passes() -> None:
    check(GROUPED, model="o/base")
    check(GROUPED, model="o/model", method="lora")  # which writes an adapter
    check(GROUPED, model="o/model", export=False)
    check(GROUPED, model="o/initial")
