"""Tensors are in a file as safetensors has them, bit for bit, whatever their strides."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.snapshots import disk
from model.snapshots.attempt import begin
from model.snapshots.errors import SnapshotBroken, SnapshotError
from model.snapshots.manifest import Shard
from model.snapshots.shard_file import DTYPES, ShardFile, write_shard
from tests.model.snapshot_runs import assert_whole, newest, same, tensors, write

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.ndim else tensor,
    "every other": lambda tensor: tensor[::2] if tensor.ndim else tensor,
    "expanded": lambda tensor: tensor.expand(2, *tensor.shape),
    "a slice": lambda tensor: tensor[1:] if tensor.ndim else tensor,
}

shapes = st.lists(st.integers(0, 5), max_size=3)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
described = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes, st.sampled_from(sorted(VIEWS))))


SEEDED = torch.Generator().manual_seed(0)


def some_tensor(dtype: str, shape: list[int], view: str) -> Tensor:
    raw = torch.randint(0, 256, (*shape, DTYPES[dtype].itemsize), dtype=torch.uint8, generator=SEEDED)
    if dtype == "BOOL":
        raw = raw % 2
    return VIEWS[view](raw.view(DTYPES[dtype]).reshape(shape))


@settings(max_examples=60)
@given(described=described)
def test_shard_is_read_alike_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[str, list[int], str]]
) -> None:
    given = {name: some_tensor(*how) for name, how in described.items()}
    staging = begin(tmp_path_factory.mktemp("root"), 1)
    shard = write_shard(staging, "all.safetensors", given)
    file = staging / shard.name
    content = file.read_bytes()
    assert (shard.nbytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert sorted(shard.tensors) == sorted(given)
    with safe_open(file, framework="pt") as theirs, ShardFile(file) as ours:
        assert sorted(theirs.keys()) == sorted(given)
        for name, tensor in given.items():
            assert same(theirs.get_tensor(name), tensor)
            assert same(ours.tensor(name), tensor)


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    given = {name: tensor.contiguous() for name, tensor in tensors(3).items()}
    save_file(given, tmp_path / "theirs.safetensors")
    with ShardFile(tmp_path / "theirs.safetensors") as file:
        assert all(same(file.tensor(name), tensor) for name, tensor in given.items())


def test_data_of_every_tensor_is_aligned(tmp_path: Path) -> None:
    given = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3), "c": torch.ones(1, dtype=torch.int64)}
    write_shard(staging := begin(tmp_path, 1), "all.safetensors", given)
    content = (staging / "all.safetensors").read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    assert data % 8 == 0
    assert all(header[name]["data_offsets"][0] % given[name].itemsize == 0 for name in given)


def test_contiguous_tensor_is_written_from_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Any] = []
    monkeypatch.setattr(disk, "write_file", lambda path, given, nbytes: parts.extend(given))
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    write_shard(begin(tmp_path, 1), "one.safetensors", {"w": parameter})
    assert np.frombuffer(parts[1], dtype=np.uint8).ctypes.data == parameter.data_ptr()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = os.write
    monkeypatch.setattr(os, "write", lambda handle, chunk: write_all(handle, chunk[:7]))
    monkeypatch.setattr(disk, "CHUNK_BYTES", 30)
    write(tmp_path, 20)
    assert_whole(newest(tmp_path))


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta"), torch.eye(2).to_sparse()],
    ids=["complex", "meta", "sparse"],
)
def test_tensor_that_cannot_be_stored_is_refused_by_name(tmp_path: Path, tensor: Tensor) -> None:
    staging = begin(tmp_path, 1)
    with pytest.raises(SnapshotError, match=r"tensor odd of .* cannot be stored"):
        write_shard(staging, "odd.safetensors", {"odd": tensor})
    assert not any(staging.iterdir())


@pytest.mark.parametrize("name", ["", "a", "../a.safetensors", "a/b.safetensors", ".a.safetensors", "manifest.json"])
def test_shard_name_is_a_plain_file_name(tmp_path: Path, name: str) -> None:
    staging = begin(tmp_path, 1)
    with pytest.raises(SnapshotError, match="shard name"):
        write_shard(staging, name, {})
    with pytest.raises(SnapshotError, match="shard name"):
        Shard(name, 0, "", ())


def test_failure_while_tensors_are_read_leaves_no_file(tmp_path: Path) -> None:
    def parts() -> Any:
        yield b"some"
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        disk.write_file(tmp_path / "file", parts(), 8)
    assert not any(tmp_path.iterdir())


def file_of(path: Path, header: bytes, data: bytes = bytes(8)) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "the header is not JSON"),
        (b"[1]", "the header is a JSON list; expected an object"),
        (b"[" * 100_000, "the header is not JSON"),
    ],
)
def test_a_file_without_a_header_is_broken(tmp_path: Path, header: bytes, said: str) -> None:
    with pytest.raises(SnapshotBroken, match=said):
        ShardFile(file_of(tmp_path / "a", header))
    (tmp_path / "b").write_bytes((1 << 40).to_bytes(8, "little"))
    with pytest.raises(SnapshotBroken, match="it is not safetensors"):
        ShardFile(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"short")
    with pytest.raises(SnapshotBroken, match="is truncated"):
        ShardFile(tmp_path / "c")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        "all of it",
        None,
    ],
)
def test_an_entry_that_does_not_say_where_a_tensor_lies_is_broken(tmp_path: Path, entry: object) -> None:
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    with ShardFile(file_of(tmp_path / "a", json.dumps({"good": good, "bad": entry}).encode())) as file:
        assert file.tensor("good").tolist() == [0.0, 0.0]
        with pytest.raises(SnapshotBroken, match="entry for bad is malformed"):
            file.tensor("bad")
        with pytest.raises(SnapshotBroken, match="entry for absent is malformed"):
            file.tensor("absent")


def test_a_tensor_beyond_the_end_of_its_file_is_broken(tmp_path: Path) -> None:
    far = {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}
    with (
        ShardFile(file_of(tmp_path / "a", json.dumps({"far": far}).encode())) as file,
        pytest.raises(SnapshotBroken, match="is truncated"),
    ):
        file.tensor("far")
