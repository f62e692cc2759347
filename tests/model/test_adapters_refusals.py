"""LoRA that cannot be applied is refused by name, and an adapter that cannot be finished leaves nothing behind."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.adapters.errors import AdapterError
from model.adapters.lora_read import read_adapter
from model.adapters.lora_write import write_adapter
from model.adapters.overlay import open_with_adapters
from model.adapters.spec import LoraSpec
from model.checkpoint import Checkpoint, CheckpointError
from model.config import read_config
from tests.model.adapters import edit_config, edit_weights, matrices, write_random
from tests.model.files import edit_json

ROOT = Path(__file__).parents[2]
SPEC = LoraSpec(2, 4.0, ("o_proj", "kv_b_proj"), routed_experts=True)
FIRST = "base_model.model.model.layers.0.self_attn.o_proj"
EXPERTS = "base_model.model.model.layers.1.mlp.experts"


@pytest.fixture
def adapter(small: Path, tmp_path: Path) -> Path:
    return write_random(tmp_path / "adapter", small, SPEC)


def refused(base: Path, adapter: Path, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        read_adapter(adapter, read_config(base))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type is 'IA3'; expected 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, r"use_dora is set \(DoRA\); only plain LoRA is applied: merge it with PEFT"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"bias": "all"}, "bias is 'all'; expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"alora_invocation_tokens": [4, 5]}, r"alora_invocation_tokens is set \(activated LoRA\)"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base weights"),
        ({"init_lora_weights": ["olora"]}, r"init_lora_weights is \['olora'\]"),
        ({"new_trick": 3, "other": "x"}, "sets new_trick, other, which this version does not know"),
        ({"r": 0}, "r is 0; expected an integer of at least 1"),
        ({"r": 1.5}, "r is 1.5"),
        ({"r": True}, "r is True"),
        ({"r": 10**400}, "r is 1000"),
        ({"lora_alpha": None}, "lora_alpha is None; expected a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts'; expected a list of names"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; expected names and numbers"),
        ({"rank_pattern": {"o_proj": 1.5}}, "rank_pattern gives 'o_proj' 1.5; expected a number above 0"),
        ({"alpha_pattern": {"o_proj": "big"}}, "alpha_pattern gives 'o_proj' 'big'"),
        ({"alpha_pattern": {"(a+)+b": 2}}, re.escape("alpha_pattern has the pattern '(a+)+b'; expected module names")),
        ({"alpha_pattern": {".*.*.*.*x": 2}}, "at most 3 repeats"),
        ({"alpha_pattern": {"(a": 2}}, re.escape("the pattern '(a', which is none: missing )")),
    ],
)
def test_config_that_means_something_else_is_refused_by_field(
    small: Path, adapter: Path, fields: dict[str, Any], said: str
) -> None:
    edit_config(adapter, **fields)
    refused(small, adapter, said)


@pytest.mark.parametrize(
    "fields", [{"use_dora": False, "new_trick": None, "lora_dropout": 0.1}, {"init_lora_weights": "gaussian"}]
)
def test_config_that_means_the_same_is_read(small: Path, adapter: Path, fields: dict[str, Any]) -> None:
    edit_config(adapter, **fields)
    assert read_adapter(adapter, read_config(small)).changes("model.layers.0.self_attn.o_proj.weight")


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read as JSON"), ("[]", "holds a JSON list")])
def test_config_that_is_no_object_is_named(small: Path, adapter: Path, text: str, said: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    refused(small, adapter, rf"adapter_config\.json {said}")


def test_missing_files_are_named(small: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "elsewhere")
    refused(small, adapter, r"adapter has no adapter_model\.safetensors$")
    (adapter / "adapter_model.bin").write_bytes(b"cposix\nsystem\n(S'touch /tmp/owned'\ntR.")
    refused(small, adapter, "pickled weights only")
    (adapter / "adapter_config.json").unlink()
    refused(small, adapter, r"adapter_config\.json does not exist: give the directory of a LoRA adapter")


def test_truncated_weights_are_named(small: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated"):
        read_adapter(adapter, read_config(small))


MISFITS: dict[str, tuple[dict[str, Tensor], tuple[str, ...], str]] = {
    "A of another width": (
        {f"{FIRST}.lora_A.weight": torch.ones(2, 31)},
        (),
        r"layers\.0\.self_attn\.o_proj\.lora_A is \[2, 31\], expected \[2, 32\] for rank 2$",
    ),
    "another rank": (
        {f"{FIRST}.lora_A.weight": torch.ones(3, 32), f"{FIRST}.lora_B.weight": torch.ones(32, 3)},
        (),
        r"o_proj\.lora_A is \[3, 32\], expected \[2, 32\] for rank 2$",
    ),
    "B alone": ({}, (f"{FIRST}.lora_A.weight",), r"model\.layers\.0\.self_attn\.o_proj has lora_B alone$"),
    "a vector": ({f"{FIRST}.lora_magnitude_vector": torch.ones(3)}, (), r"magnitude_vector \[3\] is no matrix of LoRA"),
    "base weights beside": (
        {"base_model.model.lm_head.base_layer.weight": torch.ones(2, 2)},
        (),
        r"lm_head\.base_layer\.weight \[2, 2\] is no matrix of LoRA",
    ),
    "layer of another model": (
        {f"{FIRST}x.lora_A.weight": torch.ones(2, 32), f"{FIRST}x.lora_B.weight": torch.ones(32, 2)},
        (),
        r"the model has no linear layer model\.layers\.0\.self_attn\.o_projx$",
    ),
    "embedding": (
        {
            "base_model.model.model.embed_tokens.lora_A.weight": torch.ones(2, 32),
            "base_model.model.model.embed_tokens.lora_B.weight": torch.ones(512, 2),
        },
        (),
        r"no linear layer model\.embed_tokens",
    ),
    "fewer experts": (
        {f"{EXPERTS}.lora_A.weight": torch.ones(8, 16), f"{EXPERTS}.lora_B.weight": torch.ones(32, 8)},
        (),
        r"mlp\.experts\.lora_A is \[8, 16\], expected \[16, 16\] for rank 2 and 8 experts",
    ),
    "wider experts": (
        {f"{EXPERTS}.lora_A.weight": torch.ones(16, 17), f"{EXPERTS}.lora_B.weight": torch.ones(32, 16)},
        (),
        r"mlp\.experts goes from 17 to 32, the model's routed experts from 32 to 32 \(gate_up_proj\) and from 16 to 32",
    ),
    "the same kind twice": (
        {f"{EXPERTS}.lora_A.weight": torch.ones(16, 32), f"{EXPERTS}.lora_B.weight": torch.ones(32, 16)},
        (),
        r"layers\.1\.mlp\.experts\.gate_up_proj is adapted twice",
    ),
    "an expert by itself as well": (
        {
            f"{EXPERTS}.3.up_proj.lora_A.weight": torch.ones(2, 32),
            f"{EXPERTS}.3.up_proj.lora_B.weight": torch.ones(16, 2),
        },
        (),
        r"experts\.3\.up_proj is adapted twice",
    ),
    "experts of a dense layer": (
        {
            f"{EXPERTS.replace('.1.', '.0.')}.lora_A.weight": torch.ones(16, 16),
            f"{EXPERTS.replace('.1.', '.0.')}.lora_B.weight": torch.ones(32, 16),
        },
        (),
        r"no linear layer model\.layers\.0\.mlp\.experts",
    ),
    "experts of layer 01": (
        {
            f"{EXPERTS.replace('.1.', '.01.')}.lora_A.weight": torch.ones(16, 16),
            f"{EXPERTS.replace('.1.', '.01.')}.lora_B.weight": torch.ones(32, 16),
        },
        (),
        r"no linear layer model\.layers\.01\.mlp\.experts",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_matrix_that_does_not_fit_is_named(small: Path, adapter: Path, misfit: str) -> None:
    add, drop, said = MISFITS[misfit]
    edit_weights(adapter, add, drop)
    refused(small, adapter, f"adapter does not fit the model: .*{said}")


def test_adapter_of_another_model_names_some_misfits_and_counts_the_rest(
    checkpoint: Callable[[str], Path], adapter: Path
) -> None:
    refused(checkpoint("tiny"), adapter, r"o_proj\.lora_A is \[2, 32\], expected \[2, 512\] .* and 5 more$")


def test_adapter_without_matrices_is_refused(small: Path, adapter: Path) -> None:
    edit_weights(adapter, {}, tuple(load_file(adapter / "adapter_model.safetensors")))
    refused(small, adapter, "has no LoRA matrices")


def test_damaged_numbers_are_refused_where_they_are_read(small: Path, adapter: Path) -> None:
    b = load_file(adapter / "adapter_model.safetensors")[f"{EXPERTS}.lora_B.weight"]
    b[3, 5] = float("nan")  # row 3 of expert 5
    edit_weights(adapter, {f"{EXPERTS}.lora_B.weight": b})
    merged = open_with_adapters(small, (adapter,))
    merged.expert(1, 4)
    with pytest.raises(AdapterError, match=r"makes model\.layers\.1\.mlp\.experts\.5\.down_proj\.weight infinite"):
        merged.expert(1, 5)


def test_unknown_matrix_is_named(small: Path, adapter: Path) -> None:
    opened = read_adapter(adapter, read_config(small))
    for name in ("model.layers.0.self_attn.q_b_proj.lora_A", "model.layers.0.self_attn.o_proj.weight"):
        with pytest.raises(AdapterError, match=f"adapter has no {re.escape(name)}"):
            next(opened.matrices([name]))


def write(base: Path, out: Path, given: Iterator[tuple[str, Tensor]]) -> None:
    write_adapter(out, SPEC, read_config(base), given, "base")


@pytest.mark.parametrize("written", [0, 1, 20, 30])
def test_crash_midway_leaves_nothing(small: Path, tmp_path: Path, written: int) -> None:
    def breaking() -> Iterator[tuple[str, Tensor]]:
        for count, item in enumerate(matrices(read_config(small), SPEC)):
            if count == written:
                raise OSError("the disk went away")
            yield item

    with pytest.raises(OSError, match="the disk went away"):
        write(small, tmp_path / "out", breaking())
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_nothing_under_the_name(small: Path, tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from model.adapters.lora_write import write_adapter
from model.adapters.spec import LoraSpec, lora_tensors
from model.config import read_config
import torch
spec, config = LoraSpec(2, 4.0, ("o_proj",)), read_config(Path({str(small)!r}))
def dying():
    for count, (name, shape) in enumerate(lora_tensors(config, spec).items()):
        if count == 4:
            os.kill(os.getpid(), 9)
        yield name, torch.ones(shape)
write_adapter({str(tmp_path / "out")!r}, spec, config, dying(), "base")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    write(small, tmp_path / "out", matrices(read_config(small), SPEC))  # what it left is in nobody's way


def wrong(base: Path, change: Callable[[list[tuple[str, Tensor]]], object]) -> Iterator[tuple[str, Tensor]]:
    listed = list(matrices(read_config(base), SPEC))
    change(listed)
    return iter(listed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda listed: listed.pop(3),
            r"^matrices were not given: 1, first model\.layers\.0\.self_attn\.o_proj\.lora_B",
        ),
        (lambda listed: listed.append(listed[0]), r"kv_b_proj\.lora_A was given twice"),
        (lambda listed: listed.append(("x", torch.ones(1))), "x is not of this adapter"),
        (lambda listed: listed.insert(0, (listed.pop(0)[0], torch.ones(3, 16))), r"is \[3, 16\]; expected \[2, 16\]"),
        (lambda listed: listed[5][1].fill_(torch.inf), "numbers that are not finite: training diverged"),
    ],
)
def test_matrices_that_are_not_the_specs_are_refused(
    small: Path, tmp_path: Path, change: Callable[[list[tuple[str, Tensor]]], object], said: str
) -> None:
    with pytest.raises(AdapterError, match=said):
        write(small, tmp_path / "out", wrong(small, change))
    assert list(tmp_path.iterdir()) == []


def test_directory_in_use_is_refused_and_untouched(small: Path, adapter: Path) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(CheckpointError, match="exists and is not an empty directory: give a new one"):
        write(small, adapter, matrices(read_config(small), SPEC))
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_tied_head_is_not_adapted(copy: Path, adapter: Path) -> None:
    edit_json(copy / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
    head = "base_model.model.lm_head"
    edit_weights(adapter, {f"{head}.lora_A.weight": torch.ones(2, 32), f"{head}.lora_B.weight": torch.ones(512, 2)})
    assert Checkpoint.open(copy).config.tie_word_embeddings
    refused(copy, adapter, "no linear layer lm_head")
