"""LoRA in PEFT's format: PEFT reads what is written here, and what PEFT writes is merged here as PEFT merges it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from kernels.threads import set_threads
from model.adapters.lora_layout import a_index, b_index
from model.adapters.lora_merge import merge
from model.adapters.lora_read import read_adapter
from model.adapters.lora_write import write_adapter
from model.adapters.overlay import merged_tensors, open_with_adapters
from model.adapters.spec import LoraSpec, lora_tensors
from model.config import read_config, read_raw_config
from model.export import export_checkpoint
from tests import oracle
from tests.conftest import MakeCheckpoint
from tests.model.adapters import (
    EXPERTS,
    LITE,
    TOKENS,
    V2,
    edit_config,
    edit_weights,
    matrices,
    peft_adapter,
    peft_logits,
    peft_merged,
    write_random,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


@pytest.mark.parametrize(("shape", "targets"), [("tiny", V2), ("tiny-lite", LITE)])
def test_peft_computes_what_the_merged_export_does(
    checkpoint: MakeCheckpoint, tmp_path: Path, shape: str, targets: tuple[str, ...]
) -> None:
    base = checkpoint(shape)
    adapter = write_random(tmp_path / "adapter", base, LoraSpec(4, 6.0, targets, routed_experts=True))
    opened = open_with_adapters(base, (adapter,))
    out = export_checkpoint(tmp_path / "out", read_raw_config(base), merged_tensors(opened), base)
    ours, plain = oracle.logits(out, TOKENS[0].tolist()), oracle.logits(base, TOKENS[0].tolist())
    theirs = peft_logits(base, adapter)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (ours - plain).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize(
    ("targets", "experts"),
    [(("kv_b_proj",), False), ((), True), (("mlp.down_proj",), False), (("shared_experts.up_proj",), True)],
)
def test_peft_merges_any_choice_of_targets_alike(
    small: Path, tmp_path: Path, targets: tuple[str, ...], experts: bool
) -> None:
    adapter = write_random(tmp_path / "adapter", small, LoraSpec(3, 2.5, targets, experts, rslora=True))
    assert_merges_alike(small, adapter, tmp_path)


WAYS: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "one kind of experts": {"target_modules": ["o_proj"], "target_parameters": EXPERTS[1:]},
    "the other kind": {"target_modules": ["o_proj"], "target_parameters": EXPERTS[:1]},
    "all linear, which fuses gate and up at twice the rank": {"target_modules": "all-linear"},
    "old names": {"target_modules": ["q_b_proj", "gate_proj", "up_proj", "down_proj"]},
    "rank-stabilised": {"target_modules": ["q_a_proj"], "target_parameters": EXPERTS, "use_rslora": True},
    "dense layers": {"target_modules": ["lm_head"], "target_parameters": ["layers.0.mlp.up_proj.weight"]},
    "patterns": {
        "target_modules": ["kv_b_proj", "o_proj"],
        "target_parameters": [*EXPERTS, "shared_experts.gate_proj.weight"],
        "rank_pattern": {"o_proj": 5, r".*\.gate_up_proj": 2, "gate_proj": 7},
        "alpha_pattern": {r"^model\.layers\.(0|2)\.self_attn\.kv_b_proj": 11, r"layers\.\d+\..*down_proj": 1.5},
    },
    "some layers": {"target_modules": ["kv_b_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_peft_wrote_merges_to_pefts_own_weights(small: Path, tmp_path: Path, way: str) -> None:
    adapter = peft_adapter(small, tmp_path / "adapter", r=4, lora_alpha=6, **WAYS[way])
    assert_merges_alike(small, adapter, tmp_path)


def assert_merges_alike(base: Path, adapter: Path, tmp_path: Path) -> None:
    ours = dict(merged_tensors(open_with_adapters(base, (adapter,))))
    theirs = peft_merged(base, adapter, tmp_path / "theirs")
    plain = load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-6, name
    changed = {name for name, tensor in theirs.items() if not torch.equal(tensor, plain[name])}
    assert changed
    opened = read_adapter(adapter, read_config(base))
    assert {name for name in ours if opened.changes(name)} == changed


def test_experts_one_by_one_are_read_as_peft_converts_them(small: Path, tmp_path: Path) -> None:
    """As PEFT wrote them when each expert's matrices were modules of their own."""
    adapter = peft_adapter(small, tmp_path / "adapter", r=2, lora_alpha=3, target_modules=["o_proj"])
    config = read_config(small)
    add: dict[str, Tensor] = {}
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            for part, out, inner in (("gate_proj", 16, 32), ("up_proj", 16, 32), ("down_proj", 32, 16)):
                name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{part}"
                add |= {f"{name}.lora_A.weight": torch.randn(2, inner), f"{name}.lora_B.weight": torch.randn(out, 2)}
    edit_weights(adapter, add)
    edit_config(adapter, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    ours = dict(merged_tensors(open_with_adapters(small, (adapter,))))
    for name, tensor in peft_merged(small, adapter, tmp_path / "theirs").items():
        assert (ours[name] - tensor).abs().max() < 1e-5, name


def test_bfloat16_base_is_rounded_once(small: Path, tmp_path: Path) -> None:
    adapter = write_random(tmp_path / "adapter", small, LoraSpec(4, 8.0, V2, routed_experts=True))
    halved = ((name, tensor.bfloat16()) for name, tensor in merged_tensors(open_with_adapters(small)))
    base = export_checkpoint(tmp_path / "base", read_raw_config(small) | {"dtype": "bfloat16"}, halved, small)
    exact = dict(merged_tensors(open_with_adapters(base)))
    theirs = peft_merged(base, adapter, tmp_path / "theirs", torch.bfloat16)
    with torch.no_grad():
        for name, tensor in merged_tensors(open_with_adapters(base, (adapter,))):
            assert tensor.dtype == exact[name].dtype == torch.bfloat16
            assert (tensor - theirs[name]).abs().max() <= 2**-7 * theirs[name].abs().max()
    a, b = torch.randn(4, 24), torch.randn(32, 4)
    weight = torch.randn(32, 24).bfloat16()
    assert torch.equal(merge(weight, a, b, 0.5), (weight.double() + 0.5 * b.double() @ a.double()).bfloat16())


def test_two_adapters_add_up(small: Path, tmp_path: Path) -> None:
    spec = LoraSpec(2, 2.0, ("o_proj",), routed_experts=True)
    one, two = (write_random(tmp_path / f"{seed}", small, spec, seed) for seed in (1, 2))
    plain, both = open_with_adapters(small), open_with_adapters(small, (one, two))
    first, second = open_with_adapters(small, (one,)), open_with_adapters(small, (two,))
    for name in plain.entries:
        sum_ = first.tensor(name) + second.tensor(name) - plain.tensor(name)
        assert (both.tensor(name) - sum_).abs().max() < 1e-6


def test_matrices_are_read_back_under_our_names(small: Path, tmp_path: Path) -> None:
    spec = LoraSpec(3, 1.0, V2, routed_experts=True)
    adapter = write_random(tmp_path / "adapter", small, spec)
    config = read_config(small)
    written = dict(matrices(config, spec))
    opened = read_adapter(adapter, config)
    for (name, matrix), read in zip(written.items(), opened.matrices(written), strict=True):
        assert torch.equal(read, matrix), name
    assert written.keys() == lora_tensors(config, spec).keys()


def test_any_order_of_matrices_gives_the_same_file(small: Path, tmp_path: Path) -> None:
    spec, config = LoraSpec(3, 1.0, ("o_proj",), routed_experts=True), read_config(small)
    forth = write_random(tmp_path / "forth", small, spec)
    back = write_adapter(tmp_path / "back", spec, config, list(matrices(config, spec))[::-1], str(small))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (forth / name).read_bytes() == (back / name).read_bytes()


def test_config_names_what_peft_needs(small: Path, tmp_path: Path) -> None:
    adapter = write_random(tmp_path / "adapter", small, LoraSpec(4, 8.0, ("o_proj", "up_proj"), routed_experts=True))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj"]
    assert config["target_parameters"] == [
        *("mlp.experts.down_proj", "mlp.experts.gate_up_proj"),
        *("mlp.shared_experts.up_proj.weight", "mlp.up_proj.weight"),
    ]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(small))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
@settings(max_examples=50)
def test_experts_parts_are_those_of_pefts_reshape(rank: int, experts: int, inputs: int, outputs: int) -> None:
    a, b = torch.randn(rank * experts, inputs), torch.randn(outputs, rank * experts)
    whole_a, whole_b = a.reshape(experts, -1, inputs), b.reshape(outputs, -1, experts)
    for expert in range(experts):
        assert torch.equal(a[a_index(expert, rank)], whole_a[expert])
        assert torch.equal(b[b_index(expert, experts)], whole_b[:, :, expert])
        assert torch.equal(b[b_index(expert, experts, slice(1, None))], whole_b[1:, :, expert])


def test_bits_do_not_depend_on_threads_or_on_the_other_half() -> None:
    weight, a, b = torch.randn(176, 96), torch.randn(5, 96), torch.randn(176, 5)
    before = torch.get_num_threads()
    try:
        set_threads(1)
        alone = merge(weight, a, b, 1 / 3)
        set_threads(3)
        assert torch.equal(merge(weight, a, b, 1 / 3), alone)
        assert torch.equal(merge(weight[88:], a, b[88:], 1 / 3), alone[88:])
    finally:
        set_threads(before)
