"""What LoRA may change: targets by name, the shapes of every matrix, and refusals that list what there is."""

import pytest

from model.adapters.errors import AdapterError
from model.adapters.spec import LoraSpec, lora_targets, lora_tensors
from model.config import parse_config
from tests.model.shapes import SMALL, V2, V2_LITE

HEAD = {"architectures": ["DeepseekV2ForCausalLM"], "num_key_value_heads": 2}
CONFIG = parse_config(SMALL | HEAD)
DENSE = parse_config(SMALL | HEAD | {"first_k_dense_replace": 3})
MLP = ("gate_proj", "up_proj", "down_proj")


def test_shapes_are_those_of_the_factors() -> None:
    spec = LoraSpec(4, 8.0, ("q_b_proj", "mlp.down_proj", "shared_experts.gate_proj"), routed_experts=True)
    shapes = lora_tensors(CONFIG, spec)
    assert shapes["model.layers.2.self_attn.q_b_proj.lora_A"] == (4, 24)
    assert shapes["model.layers.2.self_attn.q_b_proj.lora_B"] == (48, 4)
    assert shapes["model.layers.0.mlp.down_proj.lora_A"] == (4, 48)
    assert shapes["model.layers.1.mlp.shared_experts.gate_proj.lora_B"] == (16, 4)
    expert = "model.layers.1.mlp.experts.7"
    assert shapes[f"{expert}.gate_up_proj.lora_A"] == (4, 32)
    assert shapes[f"{expert}.gate_up_proj.lora_B"] == (32, 4)
    assert shapes[f"{expert}.down_proj.lora_A"] == (4, 16)
    assert shapes[f"{expert}.down_proj.lora_B"] == (32, 4)
    assert len(shapes) == 2 * (3 + 1 + 2 + 2 * 8 * 2)


def test_order_is_that_of_the_layers() -> None:
    spec = LoraSpec(1, 1.0, ("o_proj", *MLP), routed_experts=True)
    layers = [int(name.split(".")[2]) for name in lora_tensors(CONFIG, spec)]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1, 2}


@pytest.mark.parametrize(
    ("target", "ends"),
    [
        ("up_proj", {"mlp.up_proj", "mlp.shared_experts.up_proj"}),
        ("mlp.up_proj", {"mlp.up_proj"}),
        ("shared_experts.up_proj", {"mlp.shared_experts.up_proj"}),
        ("kv_a_proj_with_mqa", {"self_attn.kv_a_proj_with_mqa"}),
    ],
)
def test_target_means_every_layer_of_that_name(target: str, ends: set[str]) -> None:
    modules = {name.rpartition(".")[0] for name in lora_tensors(CONFIG, LoraSpec(2, 1.0, (target,)))}
    assert {module.split(".", 3)[3] for module in modules} == ends


@pytest.mark.parametrize(("shape", "query"), [(V2, ["q_a_proj", "q_b_proj"]), (V2_LITE, ["q_proj"])])
def test_released_models_targets(shape: dict[str, object], query: list[str]) -> None:
    attention = [*query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    both = [name for part in MLP for name in (part, f"mlp.{part}")]
    assert list(lora_targets(parse_config(shape))) == [*attention, *both, *(f"shared_experts.{part}" for part in MLP)]


def test_unknown_targets_are_named_with_the_possible_ones() -> None:
    said = r"targets q_proj, experts: no such layers; expected some of q_a_proj, q_b_proj, .*shared_experts\.down_proj$"
    with pytest.raises(AdapterError, match=said):
        lora_tensors(CONFIG, LoraSpec(2, 1.0, ("q_proj", "o_proj", "experts")))


def test_routed_experts_of_a_dense_model_are_refused() -> None:
    with pytest.raises(AdapterError, match="the model has none"):
        lora_tensors(DENSE, LoraSpec(2, 1.0, routed_experts=True))


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_rank_that_is_none_is_refused(rank: int) -> None:
    with pytest.raises(AdapterError, match=f"rank is {rank}; expected an integer of at least 1"):
        LoraSpec(rank, 1.0, ("o_proj",))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_that_scales_nothing_is_refused(alpha: float) -> None:
    with pytest.raises(AdapterError, match=f"alpha is {alpha}; expected a finite number above 0"):
        LoraSpec(1, alpha, ("o_proj",))


def test_nothing_to_change_is_refused() -> None:
    with pytest.raises(AdapterError, match="no targets and no routed experts"):
        LoraSpec(1, 1.0)


def test_scaling() -> None:
    assert LoraSpec(16, 8.0, ("o_proj",)).scaling == 0.5
    assert LoraSpec(16, 8.0, ("o_proj",), rslora=True).scaling == 2.0
