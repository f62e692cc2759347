"""A checkpoint under adapters looks like any other, and only what is asked for is read from any file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import model.adapters.delta
import model.adapters.lora_read
import model.checkpoint
from model.adapters.delta import write_delta
from model.adapters.errors import AdapterError
from model.adapters.lora_layout import a_index, b_index
from model.adapters.overlay import merged_tensors, open_with_adapters
from model.adapters.spec import LoraSpec
from model.checkpoint import Checkpoint
from model.config import read_raw_config
from model.export import export_checkpoint
from model.tensors import expert_names
from tests.model.adapters import write_random

SPEC = LoraSpec(2, 4.0, ("o_proj",), routed_experts=True)
ATTENTION = LoraSpec(2, 4.0, ("o_proj",))
Read = tuple[str, str, object]


class Reads:
    """Stands in for safe_open and notes what was asked of which file, and how many files were opened."""

    def __init__(self) -> None:
        self.read: list[Read] = []
        self.opened: list[str] = []
        self._open = model.checkpoint.safe_open

    def __call__(self, file: Path, **options: str) -> "_NotedFile":
        self.opened.append(file.name)
        return _NotedFile(self.read, file, self._open(file, **options))


class _NotedFile:
    def __init__(self, read: list[Read], file: Path, opened: Any) -> None:
        self._read, self._file, self._opened = read, file, opened

    def __enter__(self) -> "_NotedFile":
        self._opened.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(*error)

    def get_tensor(self, name: str) -> torch.Tensor:
        self._read.append((self._file.name, name, None))
        return self._opened.get_tensor(name)

    def get_slice(self, name: str) -> "_NotedSlice":
        return _NotedSlice(self._read, self._file.name, name, self._opened.get_slice(name))


class _NotedSlice:
    def __init__(self, read: list[Read], file: str, name: str, slices: Any) -> None:
        self._read, self._file, self._name, self._slices = read, file, name, slices

    def __getitem__(self, index: object) -> torch.Tensor:
        self._read.append((self._file, self._name, index))
        return self._slices[index]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    spy = Reads()
    for module in (model.checkpoint, model.adapters.lora_read, model.adapters.delta):
        monkeypatch.setattr(module, "safe_open", spy)
    return spy


@pytest.fixture
def lora(small: Path, tmp_path: Path) -> Path:
    return write_random(tmp_path / "lora", small, SPEC)


@pytest.fixture
def delta(small: Path, tmp_path: Path) -> Path:
    base = Checkpoint.open(small)
    given = ((name, torch.ones(base.entries[name].shape)) for name in expert_names(1, 3))
    return write_delta(tmp_path / "delta", base, {1: [3]}, given)


def test_without_adapters_it_is_the_checkpoint(small: Path) -> None:
    assert open_with_adapters(small) == Checkpoint.open(small)
    assert type(open_with_adapters(small)) is Checkpoint


def test_it_looks_like_the_base(small: Path, lora: Path) -> None:
    base, merged = Checkpoint.open(small), open_with_adapters(small, (lora,))
    assert (merged.directory, merged.config, merged.entries) == (base.directory, base.config, base.entries)
    for name, entry in base.entries.items():
        tensor = merged.tensor(name)
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, torch.float32)


def test_every_way_to_read_gives_the_merged_tensor(small: Path, lora: Path) -> None:
    base, merged = Checkpoint.open(small), open_with_adapters(small, (lora,))
    tensors = dict(merged_tensors(merged))
    assert list(tensors) == [*dict(merged_tensors(base))]
    for expert, weights in zip((4, 1), merged.experts(2, (4, 1)), strict=True):
        for name, weight in zip(
            expert_names(2, expert), (weights.gate_proj, weights.up_proj, weights.down_proj), strict=True
        ):
            assert torch.equal(weight, tensors[name])
            assert torch.equal(weight, merged.tensor(name))
            assert not torch.equal(weight, base.tensor(name))


def test_opening_reads_no_weights(small: Path, lora: Path, reads: Reads) -> None:
    open_with_adapters(small, (lora,))
    assert reads.opened == []


def test_one_expert_reads_its_own_slices_alone(small: Path, lora: Path, reads: Reads) -> None:
    open_with_adapters(small, (lora,)).expert(1, 3)
    adapter, experts = "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.experts"
    gate, up, down = expert_names(1, 3)
    assert reads.read == [
        ("model.safetensors", gate, None),
        (adapter, f"{experts}.base_layer.lora_A.weight", a_index(3, 2)),
        (adapter, f"{experts}.base_layer.lora_B.weight", b_index(3, 8, slice(0, 16))),
        ("model.safetensors", up, None),
        (adapter, f"{experts}.base_layer.lora_A.weight", a_index(3, 2)),
        (adapter, f"{experts}.base_layer.lora_B.weight", b_index(3, 8, slice(16, None))),
        ("model.safetensors", down, None),
        (adapter, f"{experts}.lora_A.weight", a_index(3, 2)),
        (adapter, f"{experts}.lora_B.weight", b_index(3, 8)),
    ]
    assert sorted(reads.opened) == ["adapter_model.safetensors", "model.safetensors"]


def test_delta_reads_what_it_replaces_alone(small: Path, delta: Path, reads: Reads) -> None:
    changed = open_with_adapters(small, (delta,))
    reads.read.clear()
    for _ in changed.experts(1, (2, 3)):
        pass
    assert [read[:2] for read in reads.read if read[0] == "delta.safetensors"] == [
        ("delta.safetensors", name) for name in expert_names(1, 3)
    ]


def test_reading_can_be_given_up_midway(small: Path, lora: Path) -> None:
    reader = open_with_adapters(small, (lora,)).tensors(expert_names(1, 3))
    next(reader)
    reader.close()


def test_merged_export_is_what_is_served(small: Path, lora: Path, tmp_path: Path) -> None:
    merged = open_with_adapters(small, (lora,))
    out = export_checkpoint(tmp_path / "out", read_raw_config(small), merged_tensors(merged), small, 40_000)
    exported = Checkpoint.open(out)
    assert all(torch.equal(exported.tensor(name), merged.tensor(name)) for name in merged.entries)
    assert exported.fingerprint() == Checkpoint.open(small).fingerprint()


def test_lora_adds_to_what_a_delta_replaced(small: Path, lora: Path, delta: Path) -> None:
    base, both = Checkpoint.open(small), open_with_adapters(small, (delta, lora))
    added = open_with_adapters(small, (lora,)).expert(1, 3).up_proj - base.expert(1, 3).up_proj
    assert (both.expert(1, 3).up_proj - (1 + added)).abs().max() < 1e-6


def test_delta_does_not_silently_undo_what_came_before(small: Path, lora: Path, delta: Path) -> None:
    name = re.escape(expert_names(1, 3)[0])
    said = rf"{delta} replaces {name}, and {lora} changed it before: give the delta first, or one of the two"
    with pytest.raises(AdapterError, match=said):
        open_with_adapters(small, (lora, delta))
    again = shutil.copytree(delta, delta.parent / "again")
    with pytest.raises(AdapterError, match="changed it before"):
        open_with_adapters(small, (delta, again))


def test_lora_of_other_layers_may_come_first(small: Path, delta: Path, tmp_path: Path) -> None:
    attention = write_random(tmp_path / "attention", small, ATTENTION)
    forth, back = (open_with_adapters(small, order) for order in ((attention, delta), (delta, attention)))
    assert all(torch.equal(forth.tensor(name), back.tensor(name)) for name in forth.entries)


def test_fingerprint_is_of_all_that_is_served(small: Path, lora: Path, delta: Path, tmp_path: Path) -> None:
    spec = LoraSpec(2, 4.0, ("o_proj",), routed_experts=True)
    other = write_random(tmp_path / "other", small, spec, seed=1)
    scaled = write_random(tmp_path / "scaled", small, LoraSpec(2, 5.0, ("o_proj",), routed_experts=True))
    choices: list[tuple[Path, ...]] = [(), (lora,), (other,), (scaled,), (delta,), (lora, other), (other, lora)]
    prints = {open_with_adapters(small, choice).fingerprint() for choice in choices}
    assert len(prints) == len(choices)
    assert all(re.fullmatch(r"[0-9a-f]{16}", print_) for print_ in prints)


def test_fingerprint_is_the_same_for_the_same_bytes_elsewhere(small: Path, lora: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(lora, tmp_path / "moved")
    os.utime(moved / "adapter_model.safetensors", ns=(0, 12345))
    assert open_with_adapters(small, (moved,)).fingerprint() == open_with_adapters(small, (lora,)).fingerprint()


def test_fingerprint_sees_one_number(small: Path, lora: Path) -> None:
    opened = open_with_adapters(small, (lora,))
    before = opened.fingerprint()
    weights = lora / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3c")
    assert opened.fingerprint() != before


def test_stamps_cover_the_adapters_files(small: Path, lora: Path, delta: Path) -> None:
    opened = open_with_adapters(small, (delta, lora))
    stamps = opened.stamps()
    assert stamps.keys() == {
        *("config.json", "model.safetensors"),
        *(str(lora / name) for name in ("adapter_config.json", "adapter_model.safetensors")),
        *(str(delta / name) for name in ("delta_config.json", "delta.safetensors")),
    }
    open_with_adapters(small, (delta, lora)).check_stamps(json.loads(json.dumps(stamps)))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_that_changed_since_is_named(small: Path, lora: Path, name: str) -> None:
    opened = open_with_adapters(small, (lora,))
    stamps = opened.stamps()
    os.utime(lora / name, ns=(0, 12345))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(lora / name))} changed since this service started"):
        opened.check_stamps(stamps)
    (lora / name).unlink()
    for use in (opened.stamps, opened.fingerprint):
        with pytest.raises(AdapterError, match=rf"{re.escape(str(lora / name))} cannot be read any more"):
            use()


def test_adapter_that_is_none_is_named(small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    said = r"empty is no adapter: it has neither adapter_config\.json nor delta_config\.json"
    with pytest.raises(AdapterError, match=said):
        open_with_adapters(small, (tmp_path / "empty",))
    for name in ("file", "nowhere"):
        with pytest.raises(AdapterError, match=rf"{name} is no directory: give that of a LoRA adapter or of a delta"):
            open_with_adapters(small, (tmp_path / name,))


def test_adapter_given_twice_is_named(small: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(lora)
    with pytest.raises(AdapterError, match="link is given twice"):
        open_with_adapters(small, (lora, tmp_path / "link"))


def test_opening_loads_no_torch(small: Path, lora: Path) -> None:
    code = (
        "import sys; from model.adapters.overlay import open_with_adapters; "
        f"open_with_adapters({str(small)!r}, ({str(lora)!r},)).stamps(); sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
