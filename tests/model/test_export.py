"""Export: what is written is what was given, transformers reads it alike, and nothing half-done is left behind."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM

from model.checkpoint import Checkpoint, CheckpointError
from model.config import ConfigError, read_raw_config
from model.export import COMPANIONS, export_checkpoint

Named = Iterator[tuple[str, Tensor]]


def named_tensors(directory: Path) -> Named:
    opened = Checkpoint.open(directory)
    return ((name, opened.tensor(name)) for name in opened.entries)


def export(source: Path, out: Path, tensors: Named | None = None, shard_bytes: int = 10**9) -> Path:
    given = named_tensors(source) if tensors is None else tensors
    return export_checkpoint(out, read_raw_config(source), given, source, shard_bytes)


@torch.no_grad()
def logits(directory: Path) -> Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(loaded, DeepseekV2ForCausalLM)
    return loaded.eval()(torch.arange(2, 60)[None]).logits


def assert_same_tensors(left: Path, right: Path) -> None:
    a, b = Checkpoint.open(left), Checkpoint.open(right)
    assert a.config == b.config
    assert a.entries.keys() == b.entries.keys()
    for name in a.entries:
        assert a.entries[name].dtype == b.entries[name].dtype
        assert torch.equal(a.tensor(name), b.tensor(name))


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_export_has_the_same_tensors_and_logits(small: Path, tmp_path: Path, shard_bytes: int) -> None:
    out = export(small, tmp_path / "out", shard_bytes=shard_bytes)
    assert_same_tensors(small, out)
    assert torch.equal(logits(out), logits(small))


def test_no_code_is_named_that_does_not_travel(small: Path, tmp_path: Path) -> None:
    named = {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}
    raw = dict(read_raw_config(small)) | {"auto_map": named}
    out = export_checkpoint(tmp_path / "out", raw, named_tensors(small), small)
    assert read_raw_config(out) == read_raw_config(small)
    assert torch.equal(logits(out), logits(small))


def test_shards_are_named_and_indexed_as_hugging_face_does(small: Path, tmp_path: Path) -> None:
    out = export(small, tmp_path / "out", shard_bytes=40_000)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    entries = Checkpoint.open(out).entries
    assert index["weight_map"] == {name: entry.file.name for name, entry in entries.items()}
    assert index["metadata"]["total_size"] == sum(4 * torch.Size(entry.shape).numel() for entry in entries.values())


def test_shard_is_at_most_its_limit_or_one_tensor(small: Path, tmp_path: Path) -> None:
    limit = 10_000
    held: dict[Path, list[int]] = {}
    for entry in Checkpoint.open(export(small, tmp_path / "out", shard_bytes=limit)).entries.values():
        held.setdefault(entry.file, []).append(4 * torch.Size(entry.shape).numel())
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in held.values())
    assert max(len(sizes) for sizes in held.values()) > 1


def test_dtype_stays_as_given(small: Path, tmp_path: Path) -> None:
    half = ((name, tensor.bfloat16()) for name, tensor in named_tensors(small))
    opened = Checkpoint.open(export(small, tmp_path / "out", half))
    assert {entry.dtype for entry in opened.entries.values()} == {"BF16"}
    assert torch.equal(opened.tensor("lm_head.weight"), Checkpoint.open(small).tensor("lm_head.weight").bfloat16())


def test_slices_and_transposes_are_written_as_they_look(small: Path, tmp_path: Path) -> None:
    def views() -> Named:
        for name, tensor in named_tensors(small):
            if tensor.ndim == 2:
                yield name, tensor.t().contiguous().t()
            else:
                yield name, torch.stack([tensor, tensor])[1]

    assert_same_tensors(small, export(small, tmp_path / "out", views()))


def test_companions_travel_byte_for_byte(small: Path, tmp_path: Path) -> None:
    out = export(small, tmp_path / "out")
    present = [name for name in COMPANIONS if (small / name).exists()]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(present)
    for name in present:
        assert (out / name).read_bytes() == (small / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", *present}


@pytest.mark.parametrize("written", [0, 1, 30])
def test_crash_midway_leaves_nothing(small: Path, tmp_path: Path, written: int) -> None:
    def breaking() -> Named:
        for count, item in enumerate(named_tensors(small)):
            if count == written:
                raise OSError("the disk went away")
            yield item

    with pytest.raises(OSError, match="the disk went away"):
        export(small, tmp_path / "out", breaking(), shard_bytes=10_000)
    assert list(tmp_path.iterdir()) == []


def test_missing_tensor_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    given = (item for item in named_tensors(small) if item[0] != "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"first model\.norm\.weight: given None, expected \(32,\)"):
        export(small, tmp_path / "out", given)
    assert list(tmp_path.iterdir()) == []


def test_unexpected_tensor_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    def more() -> Named:
        yield "extra.weight", torch.ones(2)
        yield from named_tensors(small)

    with pytest.raises(CheckpointError, match=r"first extra\.weight: given \(2,\), expected None"):
        export(small, tmp_path / "out", more())
    assert list(tmp_path.iterdir()) == []


def test_misshaped_tensor_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    given = ((name, tensor[1:] if name == "lm_head.weight" else tensor) for name, tensor in named_tensors(small))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: given \(511, 32\), expected \(512, 32\)"):
        export(small, tmp_path / "out", given)


def test_tensor_given_twice_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    def twice() -> Named:
        yield from named_tensors(small)
        yield "lm_head.weight", torch.ones(512, 32)

    with pytest.raises(CheckpointError, match=r"lm_head\.weight was given twice"):
        export(small, tmp_path / "out", twice())


def test_no_tensors_at_all_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="given None"):
        export(small, tmp_path / "out", iter(()))
    assert list(tmp_path.iterdir()) == []


def test_config_that_cannot_be_served_is_refused(small: Path, tmp_path: Path) -> None:
    wrong = read_raw_config(small) | {"hidden_act": "gelu"}
    with pytest.raises(ConfigError, match="hidden_act"):
        export_checkpoint(tmp_path / "out", wrong, named_tensors(small))
    assert list(tmp_path.iterdir()) == []


def test_directory_in_use_is_refused_and_untouched(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(CheckpointError, match="exists and is not an empty directory: give a new one"):
        export(small, out)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_file_in_place_of_the_directory_is_refused_and_untouched(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("kept")
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        export(small, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "kept"


def test_empty_or_deep_new_directory_is_filled(small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "new"):
        assert_same_tensors(small, export(small, out))


def test_weights_can_be_read_by_whoever_reads_the_config(small: Path, tmp_path: Path) -> None:
    out = export(small, tmp_path / "out", shard_bytes=40_000)
    assert len({path.stat().st_mode for path in out.glob("model*")}) == 1
    assert (out / "config.json").stat().st_mode in {path.stat().st_mode for path in out.glob("*.safetensors")}
