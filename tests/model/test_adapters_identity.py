"""A base is known by every one of its tensors, whatever its files and however wide its numbers are."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.adapters import identity
from model.adapters.delta import read_delta, write_delta
from model.adapters.errors import AdapterError
from model.adapters.identity import base_identities, base_identity, dense_identity
from model.adapters.overlay import merged_tensors, open_with_adapters
from model.checkpoint import Checkpoint
from model.config import read_raw_config
from model.export import export_checkpoint
from model.tensors import expected_tensors
from tests.model.files import edit_json, edit_tensors
from tests.model.test_adapters_delta import EXPERTS, values

UP = "model.layers.2.mlp.experts.5.up_proj.weight"


def test_a_change_of_any_one_tensor_makes_another_base(small: Path, copy: Path) -> None:
    seen = {base_identity(Checkpoint.open(small))}
    first = load_file(copy / "model.safetensors")
    for name in expected_tensors(Checkpoint.open(small).config):
        save_file({**first, name: first[name] * 1.01}, copy / "model.safetensors")
        seen.add(base_identity(Checkpoint.open(copy)))
    assert len(seen) == 1 + len(expected_tensors(Checkpoint.open(small).config))


def test_the_dense_side_is_known_by_every_one_of_its_tensors_and_by_no_expert(small: Path, copy: Path) -> None:
    plain = dense_identity(Checkpoint.open(small))
    first = load_file(copy / "model.safetensors")
    seen = {plain}
    dense = [name for name in first if ".mlp.experts." not in name]
    for name in dense:
        save_file({**first, name: first[name] * 1.01}, copy / "model.safetensors")
        seen.add(dense_identity(Checkpoint.open(copy)))
    assert len(seen) == 1 + len(dense)
    save_file({**first, UP: first[UP] * 1.01}, copy / "model.safetensors")
    assert dense_identity(Checkpoint.open(copy)) == plain


def test_files_and_wider_numbers_make_no_other_base(small: Path, small_sharded: Path, tmp_path: Path) -> None:
    assert base_identities(Checkpoint.open(small_sharded)) == base_identities(Checkpoint.open(small))
    raw = read_raw_config(small)
    for narrow in (torch.float16, torch.bfloat16):
        found = set()
        for dtype in (narrow, torch.float32, torch.float64):
            tensors = ((name, tensor.to(narrow).to(dtype)) for name, tensor in merged_tensors(Checkpoint.open(small)))
            out = export_checkpoint(tmp_path / f"{narrow}-{dtype}", raw, tensors, shard_bytes=dtype.itemsize * 9000)
            found.add(base_identities(Checkpoint.open(out)))
        assert len(found) == 1


def test_each_file_is_opened_once(small_sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[Path] = Counter()
    safe_open = identity.safe_open

    def note(file: Path, **how: Any) -> Any:
        opened[file] += 1
        return safe_open(file, **how)

    base = Checkpoint.open(small_sharded)
    monkeypatch.setattr(identity, "safe_open", note)
    base_identity(base)
    assert opened == Counter({entry.file for entry in base.entries.values()})


def test_what_was_trained_on_a_merged_base_is_not_taken_for_the_plain_ones(small: Path, tmp_path: Path) -> None:
    plain = Checkpoint.open(small)
    delta = write_delta(tmp_path / "delta", plain, EXPERTS, values(small))
    merged = tmp_path / "merged"
    export_checkpoint(merged, read_raw_config(small), merged_tensors(open_with_adapters(small, (delta,))))
    later = write_delta(tmp_path / "later", Checkpoint.open(merged), EXPERTS, values(small))
    read_delta(later, Checkpoint.open(merged))
    for trained, base in ((later, plain), (delta, Checkpoint.open(merged))):
        with pytest.raises(AdapterError, match=r"was trained on the base 2-\w+; .* is 2-\w+: give the base"):
            read_delta(trained, base)


def test_a_delta_under_the_first_versions_identity_is_compared_by_it(small: Path, copy: Path, tmp_path: Path) -> None:
    delta = write_delta(tmp_path / "delta", Checkpoint.open(small), EXPERTS, values(small))
    _, first = base_identities(Checkpoint.open(small))
    edit_json(delta / "delta_config.json", lambda document: document.update(base=first))
    read_delta(delta, Checkpoint.open(small))
    edit_tensors(copy, lambda tensors: tensors[UP].add_(1.0))  # which that version does not look at
    read_delta(delta, Checkpoint.open(copy))
    edit_tensors(copy, lambda tensors: tensors["model.norm.weight"].add_(1.0))
    _, other = base_identities(Checkpoint.open(copy))
    with pytest.raises(AdapterError, match=f"was trained on the base {first}; .* is {other}: give the base"):
        read_delta(delta, Checkpoint.open(copy))


def test_identities_stay_from_one_version_of_this_program_to_the_next(small: Path, tmp_path: Path) -> None:
    shapes = expected_tensors(Checkpoint.open(small).config)
    counted = {name: (torch.arange(prod(shape)) % 251).view(shape) / 256 for name, shape in shapes.items()}
    out = export_checkpoint(tmp_path / "counted", read_raw_config(small), iter(counted.items()))
    assert base_identities(Checkpoint.open(out)) == (
        "2-ea7255f66b554550ceeca23d1b4da8a6",
        "555234b30fafdbabe317771eaff34c69",
    )
