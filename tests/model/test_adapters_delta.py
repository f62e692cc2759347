"""Deltas: new values for some tensors, refused on another base, and written whole or not at all."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.adapters.delta import delta_names, read_delta, write_delta
from model.adapters.errors import AdapterError
from model.adapters.identity import base_identity
from model.adapters.overlay import merged_tensors, open_with_adapters
from model.checkpoint import Checkpoint, CheckpointError
from model.config import read_raw_config
from model.export import export_checkpoint
from model.tensors import expert_names
from tests.model.files import edit_json, edit_tensors

EXPERTS = {2: [5], 1: [7, 0]}
GATE = "model.layers.1.mlp.gate.weight"


def values(base: Path, others: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(2)
    opened = Checkpoint.open(base)
    for name in delta_names(EXPERTS, others):
        yield name, torch.randn(opened.entries[name].shape)


@pytest.fixture
def delta(small: Path, tmp_path: Path) -> Path:
    return write_delta(tmp_path / "delta", Checkpoint.open(small), EXPERTS, values(small), {"run": [1, "a"]})


def test_named_tensors_have_the_new_values_and_the_others_the_old(small: Path, delta: Path) -> None:
    base, changed = Checkpoint.open(small), open_with_adapters(small, (delta,))
    new = dict(values(small))
    assert len(new) == 9
    for name in base.entries:
        assert torch.equal(changed.tensor(name), new.get(name, base.tensor(name)))
    assert torch.equal(changed.expert(1, 7).up_proj, new["model.layers.1.mlp.experts.7.up_proj.weight"])


def test_what_was_written_is_read(small: Path, delta: Path) -> None:
    read = read_delta(delta, Checkpoint.open(small))
    assert read.experts == {1: (0, 7), 2: (5,)}
    assert read.metadata == {"run": [1, "a"]}
    assert {path.name for path in delta.iterdir()} == {"delta.safetensors", "delta_config.json"}
    assert load_file(delta / "delta.safetensors").keys() == set(delta_names(EXPERTS))


def test_other_tensors_may_change_too(small: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(small)
    others = (GATE, "model.norm.weight")
    delta = write_delta(tmp_path / "delta", base, EXPERTS, values(small, others), others=others)
    new = dict(values(small, others))
    changed = open_with_adapters(small, (delta,))
    assert all(torch.equal(changed.tensor(name), new[name]) for name in others)


def test_values_take_the_bases_dtype_whatever_they_come_in(small: Path, tmp_path: Path) -> None:
    half = ((name, tensor.bfloat16()) for name, tensor in merged_tensors(open_with_adapters(small)))
    base = Checkpoint.open(export_checkpoint(tmp_path / "base", read_raw_config(small), half))
    delta = write_delta(tmp_path / "delta", base, EXPERTS, values(small))
    assert {tensor.dtype for tensor in load_file(delta / "delta.safetensors").values()} == {torch.bfloat16}
    for name, tensor in values(small):
        assert torch.equal(open_with_adapters(base.directory, (delta,)).tensor(name), tensor.bfloat16())


def test_delta_of_a_narrow_base_fits_its_wider_copy(small: Path, tmp_path: Path) -> None:
    half = [(name, tensor.bfloat16()) for name, tensor in merged_tensors(open_with_adapters(small))]
    narrow = export_checkpoint(tmp_path / "narrow", read_raw_config(small), iter(half))
    wide = export_checkpoint(
        tmp_path / "wide", read_raw_config(small), ((name, tensor.float()) for name, tensor in half), shard_bytes=40_000
    )
    delta = write_delta(tmp_path / "delta", Checkpoint.open(narrow), EXPERTS, values(small))
    name = expert_names(1, 7)[0]
    assert open_with_adapters(wide, (delta,)).tensor(name).dtype == torch.float32


def test_order_of_the_tensors_does_not_matter(small: Path, delta: Path, tmp_path: Path) -> None:
    back = write_delta(tmp_path / "back", Checkpoint.open(small), EXPERTS, list(values(small))[::-1], {"run": [1, "a"]})
    for path in delta.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", [GATE, "model.layers.2.self_attn.kv_a_layernorm.weight"])
def test_another_training_of_the_same_shape_is_another_base(small: Path, copy: Path, delta: Path, name: str) -> None:
    read_delta(delta, Checkpoint.open(copy))
    edit_tensors(copy, lambda tensors: tensors[name].add_(1e-3))
    ours, theirs = (base_identity(Checkpoint.open(base)) for base in (copy, small))
    said = f"delta was trained on the base {theirs}; .*copy is {ours}: give the base that it was trained on"
    with pytest.raises(AdapterError, match=said):
        read_delta(delta, Checkpoint.open(copy))


def test_model_of_another_shape_is_another_base(checkpoint: Callable[[str], Path], delta: Path) -> None:
    with pytest.raises(AdapterError, match="was trained on the base"):
        read_delta(delta, Checkpoint.open(checkpoint("tiny")))


def test_base_is_the_same_under_adapters(small: Path, tmp_path: Path) -> None:
    given = values(small, (GATE,))
    delta = write_delta(tmp_path / "delta", Checkpoint.open(small), EXPERTS, given, others=(GATE,))
    assert base_identity(open_with_adapters(small, (delta,))) == base_identity(Checkpoint.open(small))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"format": "peft"}, r"delta_config\.json is no delta: format is not 'shoal-delta'"),
        ({"version": 2}, "is of version 2; this program reads version 1"),
        ({"extra": 1}, "is malformed; expected base, experts, format, metadata, version"),
        ({"metadata": None}, "is malformed"),
        ({"base": 7}, "is malformed"),
        ({"experts": {"one": [1]}}, "is malformed"),
        ({"experts": {"1": 1}}, "is malformed"),
        ({"experts": {"1": [True]}}, "is malformed"),
        (
            {"experts": {"1": [0, 7], "2": [4]}},
            r"delta_config\.json and delta\.safetensors differ in .*experts\.4\.down",
        ),
        ({"experts": {"1": [0, 7]}}, r"differ in model\.layers\.2\.mlp\.experts\.5\.down_proj"),
    ],
)
def test_config_that_is_wrong_is_named(small: Path, delta: Path, fields: dict[str, Any], said: str) -> None:
    edit_json(delta / "delta_config.json", lambda raw: raw.update(fields))
    with pytest.raises(AdapterError, match=said):
        read_delta(delta, Checkpoint.open(small))


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read as JSON"), ("[]", "is no delta")])
def test_config_that_is_no_object_is_named(small: Path, delta: Path, text: str, said: str) -> None:
    (delta / "delta_config.json").write_text(text)
    with pytest.raises(AdapterError, match=rf"delta_config\.json {said}"):
        read_delta(delta, Checkpoint.open(small))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.layers.1.mlp.experts.0.up_proj.weight", (16, 31), r"is \[16, 31\], expected \[16, 32\]"),
        ("model.layers.1.mlp.experts.9.up_proj.weight", (16, 32), r"experts\.9\.up_proj.* expected no such tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    small: Path, delta: Path, name: str, shape: tuple[int, ...], said: str
) -> None:
    path = delta / "delta.safetensors"
    save_file(load_file(path) | {name: torch.ones(shape)}, path)
    with pytest.raises(AdapterError, match=f"delta does not fit .*{said}"):
        read_delta(delta, Checkpoint.open(small))


def test_missing_files_are_named(small: Path, delta: Path) -> None:
    base = Checkpoint.open(small)
    (delta / "delta.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"delta has no delta\.safetensors"):
        read_delta(delta, base)
    (delta / "delta_config.json").unlink()
    with pytest.raises(AdapterError, match=r"delta_config\.json does not exist: give the directory of a delta"):
        read_delta(delta, base)


@pytest.mark.parametrize("written", [0, 1, 8])
def test_crash_midway_leaves_nothing(small: Path, tmp_path: Path, written: int) -> None:
    def breaking() -> Iterator[tuple[str, Tensor]]:
        for count, item in enumerate(values(small)):
            if count == written:
                raise OSError("the disk went away")
            yield item

    with pytest.raises(OSError, match="the disk went away"):
        write_delta(tmp_path / "out", Checkpoint.open(small), EXPERTS, breaking())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda listed: listed.pop(3),
            r"tensors were not given: model\.layers\.1\.mlp\.experts\.7\.gate_proj\.weight$",
        ),
        (lambda listed: listed.append(listed[0]), r"experts\.0\.gate_proj\.weight was given twice, or is none"),
        (lambda listed: listed.append((GATE, torch.ones(8, 32))), r"gate\.weight was given twice, or is none"),
        (lambda listed: listed.append((listed.pop(0)[0], torch.ones(2))), r"is \[2\]; expected \[16, 32\]"),
        (lambda listed: listed[5][1].fill_(torch.nan), "numbers that are not finite: training diverged"),
    ],
)
def test_tensors_that_were_not_announced_are_refused(
    small: Path, tmp_path: Path, change: Callable[[list[tuple[str, Tensor]]], object], said: str
) -> None:
    given = list(values(small))
    change(given)
    with pytest.raises(AdapterError, match=said):
        write_delta(tmp_path / "out", Checkpoint.open(small), EXPERTS, given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("experts", "others", "said"),
    [
        ({1: [8]}, (), r"the base has no model\.layers\.1\.mlp\.experts\.8\.gate_proj"),
        ({0: [1]}, (), r"the base has no model\.layers\.0\.mlp\.experts\.1\.gate_proj"),
        ({}, ("x",), "the base has no x$"),
        ({1: []}, (), "a delta without tensors changes nothing"),
        ({}, expert_names(1, 1), "is of a routed expert: name the expert by layer and number"),
    ],
)
def test_what_the_base_lacks_is_refused_by_name(
    small: Path, tmp_path: Path, experts: dict[int, list[int]], others: tuple[str, ...], said: str
) -> None:
    with pytest.raises(AdapterError, match=said):
        write_delta(tmp_path / "out", Checkpoint.open(small), experts, (), others=others)
    assert list(tmp_path.iterdir()) == []


def test_metadata_that_json_cannot_hold_leaves_nothing(small: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_delta(tmp_path / "out", Checkpoint.open(small), EXPERTS, values(small), {"run": object()})
    assert list(tmp_path.iterdir()) == []


def test_directory_in_use_is_refused_and_untouched(small: Path, delta: Path) -> None:
    kept = shutil.copytree(delta, delta.parent / "kept")
    with pytest.raises(CheckpointError, match=re.escape(f"{delta} exists and is not an empty directory")):
        write_delta(delta, Checkpoint.open(small), EXPERTS, values(small))
    assert all((delta / path.name).read_bytes() == path.read_bytes() for path in kept.iterdir())
    assert json.loads((delta / "delta_config.json").read_text())["version"] == 1
