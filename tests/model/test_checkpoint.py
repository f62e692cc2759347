"""Opening a checkpoint: nothing is read before it is asked for, and whatever is wrong with the files is named."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import model.checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from model.config import ConfigError, parse_config
from model.tensors import expected_tensors, expert_names
from tests.model.files import edit_json, edit_tensors, join
from tests.model.shapes import V2_LITE

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


class Reads:
    """Stands in for safe_open and notes which tensors were asked of which file."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, str]] = []
        self._open = model.checkpoint.safe_open

    def __call__(self, file: Path, **options: str) -> "_NotedFile":
        return _NotedFile(self, file, self._open(file, **options))


class _NotedFile:
    def __init__(self, reads: Reads, file: Path, opened: Any) -> None:
        self._reads, self._file, self._opened = reads, file, opened

    def __enter__(self) -> "_NotedFile":
        self._opened.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(*error)

    def get_tensor(self, name: str) -> torch.Tensor:
        self._reads.tensors.append((self._file.name, name))
        return self._opened.get_tensor(name)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    spy = Reads()
    monkeypatch.setattr(model.checkpoint, "safe_open", spy)
    return spy


def test_tensors_are_those_that_were_written(small: Path) -> None:
    opened = Checkpoint.open(small)
    written = load_file(small / "model.safetensors")
    assert opened.entries.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(opened.tensor(name), tensor)


def test_sharded_checkpoint_equals_single_file(small: Path, small_sharded: Path) -> None:
    whole, sharded = Checkpoint.open(small), Checkpoint.open(small_sharded)
    assert len({entry.file for entry in sharded.entries.values()}) > 3
    assert sharded.config == whole.config
    assert sharded.fingerprint() == whole.fingerprint()
    assert sharded.entries.keys() == whole.entries.keys()
    for name in whole.entries:
        assert torch.equal(sharded.tensor(name), whole.tensor(name))


@pytest.mark.parametrize(
    ("own", "generation", "ends"),
    [
        (1, {}, (1,)),
        (1, {"eos_token_id": None}, (1,)),
        (1, {"eos_token_id": 1}, (1,)),
        (1, {"eos_token_id": 7}, (1, 7)),
        ([5, 1], {"eos_token_id": [7, 1, 3]}, (5, 1, 7, 3)),
        (None, {"eos_token_id": [7]}, (7,)),
    ],
)
def test_end_tokens_are_those_of_both_configs(
    copy: Path, own: object, generation: dict[str, object], ends: tuple[int, ...]
) -> None:
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"eos_token_id": own}))
    (copy / "generation_config.json").write_text(json.dumps(generation))
    assert Checkpoint.open(copy).config.eos_token_ids == ends


def test_checkpoint_without_generation_config_ends_as_its_config_says(copy: Path) -> None:
    (copy / "generation_config.json").unlink(missing_ok=True)
    assert Checkpoint.open(copy).config.eos_token_ids == (1,)


@pytest.mark.parametrize("given", ["1", True, 1.0, -1, 10**6, [1, "7"], {"id": 1}])
def test_end_token_that_is_none_is_named(copy: Path, given: object) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is .*; expected a token id below"):
        Checkpoint.open(copy)


def test_expert_is_its_three_matrices(small: Path) -> None:
    opened = Checkpoint.open(small)
    expert = opened.expert(2, 5)
    prefix = "model.layers.2.mlp.experts.5"
    assert torch.equal(expert.gate_proj, opened.tensor(f"{prefix}.gate_proj.weight"))
    assert torch.equal(expert.up_proj, opened.tensor(f"{prefix}.up_proj.weight"))
    assert torch.equal(expert.down_proj, opened.tensor(f"{prefix}.down_proj.weight"))


def test_opening_reads_no_weights(small_sharded: Path, reads: Reads) -> None:
    Checkpoint.open(small_sharded)
    assert reads.tensors == []


def test_expert_opens_only_its_own_tensors(small_sharded: Path, reads: Reads) -> None:
    opened = Checkpoint.open(small_sharded)
    opened.expert(1, 3)
    assert reads.tensors == [(opened.entries[name].file.name, name) for name in expert_names(1, 3)]


def test_full_size_lite_opens_in_holes(tmp_path: Path) -> None:
    """31 GB that take no room on disk: only possible when neither opening nor an expert reads the rest."""
    (tmp_path / "config.json").write_text(json.dumps(V2_LITE))
    headers: list[dict[str, Any]] = [{}]
    ends = [0]
    for name, shape in expected_tensors(parse_config(V2_LITE)).items():
        if ends[-1] > 2e9:
            headers.append({})
            ends.append(0)
        begin, ends[-1] = ends[-1], ends[-1] + 2 * torch.Size(shape).numel()
        headers[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, ends[-1]]}
    placed: dict[str, str] = {}
    for number, (header, end) in enumerate(zip(headers, ends, strict=True)):
        shard = tmp_path / f"model-{number}.safetensors"
        join(shard, header, b"")
        os.truncate(shard, shard.stat().st_size + end)
        placed |= dict.fromkeys(header, shard.name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": placed}))
    assert sum(ends) > 31e9
    expert = Checkpoint.open(tmp_path).expert(26, 63)
    assert expert.down_proj.shape == (2048, 1408)
    assert expert.down_proj.dtype == torch.bfloat16


def test_fingerprint_tells_shapes_and_settings_apart(copy: Path, small: Path) -> None:
    edit_json(copy / "config.json", lambda raw: raw.update(routed_scaling_factor=2.0))
    assert Checkpoint.open(copy).fingerprint() != Checkpoint.open(small).fingerprint()


def test_stamps_name_every_file_that_decides_what_is_served(small_sharded: Path, small: Path) -> None:
    stamps = Checkpoint.open(small_sharded).stamps()
    shards = {path.name for path in small_sharded.glob("*.safetensors")}
    assert stamps.keys() == shards | {"config.json"}
    assert Checkpoint.open(small).stamps().keys() == {"config.json", "model.safetensors"}
    assert all(stamps[name][0] == (small_sharded / name).stat().st_size for name in stamps)


def test_an_untouched_checkpoint_passes_though_opened_again(sharded_copy: Path) -> None:
    stamps = Checkpoint.open(sharded_copy).stamps()
    (sharded_copy / "tokenizer_config.json").write_text("{}")
    Checkpoint.open(sharded_copy).check_stamps(json.loads(json.dumps(stamps)))


@pytest.mark.parametrize("change", ["time", "size", "replaced"])
@pytest.mark.parametrize("which", ["config.json", "shard"])
def test_a_file_that_changed_since_is_named(sharded_copy: Path, change: str, which: str) -> None:
    opened = Checkpoint.open(sharded_copy)
    stamps = opened.stamps()
    path = sorted(sharded_copy.glob("*.safetensors"))[2] if which == "shard" else sharded_copy / which
    status = path.stat()
    if change == "time":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        new = sharded_copy / "new"
        new.write_bytes(path.read_bytes())
        os.utime(new, ns=(0, 12345))
        new.rename(path)
    said = rf"{re.escape(path.name)} changed since this service started: restart the service to serve the new weights"
    with pytest.raises(CheckpointError, match=said):
        opened.check_stamps(stamps)


def test_a_shard_that_is_gone_or_new_is_named(sharded_copy: Path, small: Path) -> None:
    opened = Checkpoint.open(sharded_copy)
    stamps = opened.stamps()
    with pytest.raises(CheckpointError, match=r"model-0.* changed since"):
        opened.check_stamps({name: stamp for name, stamp in stamps.items() if "model-00001" not in name})
    shard = sorted(sharded_copy.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(shard.name)} cannot be read any more"):
        opened.check_stamps(stamps)


def test_unknown_tensor_is_named(small: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.9\.mlp\.experts\.0\.gate_proj\.weight"):
        Checkpoint.open(small).expert(9, 0)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.rotary_emb.inv_freq"])
def test_harmless_leftover_of_other_exporters_is_tolerated(copy: Path, name: str) -> None:
    if name == "lm_head.weight":
        edit_json(copy / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
    else:
        edit_tensors(copy, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert name in Checkpoint.open(copy).entries


def test_missing_tensors_are_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: [tensors.pop(name) for name in expert_names(2, 7)])
    with pytest.raises(CheckpointError, match="missing") as refused:
        Checkpoint.open(copy)
    assert all(name in str(refused.value) for name in expert_names(2, 7))


def test_many_missing_tensors_are_counted(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.1\.mlp\.experts\.0\..* and 43 more$"):
        Checkpoint.open(copy)


def test_unexpected_tensor_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(4)}))
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.1\.self_attn\.q_proj\.bias$"):
        Checkpoint.open(copy)


def test_misshaped_tensor_is_named_with_both_shapes(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({NORM: torch.ones(31)}))
    with pytest.raises(CheckpointError, match=rf"misshaped {NORM} \(is \[31\], config\.json says \[32\]\)$"):
        Checkpoint.open(copy)


def test_every_kind_of_misfit_is_named_at_once(copy: Path) -> None:
    edit_tensors(
        copy, lambda tensors: (tensors.pop("lm_head.weight"), tensors.update({NORM: torch.ones(1), "x": torch.ones(1)}))
    )
    with pytest.raises(CheckpointError, match=rf"missing lm_head\.weight; unexpected x; misshaped {NORM} "):
        Checkpoint.open(copy)


def test_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist: give the directory"):
        Checkpoint.open(tmp_path / "nowhere")


def test_file_in_place_of_a_directory_is_named(small: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; expected the directory"):
        Checkpoint.open(small / "model.safetensors")


def test_directory_without_config_is_named(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=rf"{re.escape(str(copy))}/config\.json does not exist"):
        Checkpoint.open(copy)


def test_wrong_architecture_is_named(copy: Path) -> None:
    edit_json(copy / "config.json", lambda raw: raw.update(architectures=["LlamaForCausalLM"]))
    with pytest.raises(ConfigError, match=r"architectures is \['LlamaForCausalLM'\]"):
        Checkpoint.open(copy)


def test_directory_without_weights_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(copy))} has neither model\.safetensors nor"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt"])
def test_pickled_weights_are_refused_unread(copy: Path, name: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(b"cposix\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(CheckpointError, match="pickled weights only; convert them to safetensors"):
        Checkpoint.open(copy)


def test_missing_shard_is_named(sharded_copy: Path) -> None:
    shard = sorted(sharded_copy.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(shard.name)}, which is not in .*: fetch that shard"):
        Checkpoint.open(sharded_copy)


def test_damaged_shard_is_named(sharded_copy: Path) -> None:
    shard = sorted(sharded_copy.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{re.escape(shard.name)} is truncated"):
        Checkpoint.open(sharded_copy)


def test_tensor_that_its_shard_does_not_hold_is_named(sharded_copy: Path) -> None:
    edit_json(sharded_copy / INDEX, lambda raw: raw["weight_map"].update(ghost=min(raw["weight_map"].values())))
    with pytest.raises(CheckpointError, match=r"places ghost in shards that do not hold them"):
        Checkpoint.open(sharded_copy)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", ""])
def test_index_that_points_outside_the_directory_is_refused(sharded_copy: Path, shard: str) -> None:
    shutil.copyfile(next(sharded_copy.glob("*.safetensors")), sharded_copy.parent / "elsewhere.safetensors")
    edit_json(sharded_copy / INDEX, lambda raw: raw["weight_map"].update({NORM: shard}))
    with pytest.raises(CheckpointError, match=rf"{INDEX} names '{shard}'; expected a \.safetensors file beside it"):
        Checkpoint.open(sharded_copy)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_index_that_maps_nothing_is_named(sharded_copy: Path, text: str) -> None:
    (sharded_copy / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{INDEX} (cannot be read as JSON|has no weight_map)"):
        Checkpoint.open(sharded_copy)
