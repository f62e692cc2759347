"""A safetensors header is believed only as far as the file bears it out; every lie is refused by file and tensor."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from model.checkpoint import Checkpoint, CheckpointError
from model.safetensors_header import read_header
from tests.model.files import join, split

NORM = "model.norm.weight"


@given(data=st.data())
def test_file_cut_anywhere_is_refused_by_name(small: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    whole = (small / "model.safetensors").read_bytes()
    cut = tmp_path_factory.mktemp("cut") / "model.safetensors"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(cut))}\b"):
        read_header(cut)


def test_truncated_file_names_the_first_tensor_cut(copy: Path) -> None:
    file = copy / "model.safetensors"
    header, data = split(file)
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    last = max(offsets, key=lambda name: offsets[name][1])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is truncated: {re.escape(last)} ends at byte"):
        Checkpoint.open(copy)
    assert offsets[last][1] == len(data)


@pytest.mark.parametrize("claimed", [2**63, 10**9, 0, 5])
def test_header_that_lies_about_its_length_is_refused(copy: Path, claimed: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(struct.pack("<Q", claimed) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the header (claims|is not JSON)"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"shape": [16]}, "needs 64 bytes, not 128"),
        ({"shape": [2**62, 4]}, "needs"),
        ({"shape": [-32]}, "malformed"),
        ({"shape": [32.0]}, "malformed"),
        ({"shape": 32}, "malformed"),
        ({"dtype": "I64"}, "has dtype I64; expected one of F64, F32, F16, BF16"),
        ({"data_offsets": [0]}, "malformed"),
        ({"data_offsets": [-128, 0]}, "needs 128 bytes"),
        ({"data_offsets": [10**12, 10**12 + 128]}, "truncated"),
    ],
)
def test_header_that_lies_about_a_tensor_is_refused(copy: Path, entry: dict[str, Any], complaint: str) -> None:
    file = copy / "model.safetensors"
    header, data = split(file)
    header[NORM] |= entry
    join(file, header, data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*" + re.escape(NORM)) as refused:
        Checkpoint.open(copy)
    assert complaint in str(refused.value)


def test_bytes_that_no_tensor_covers_are_refused(copy: Path) -> None:
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"left over")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*9 bytes"):
        Checkpoint.open(copy)


def test_tensors_that_share_bytes_are_refused(copy: Path) -> None:
    """safetensors itself refuses them where a tensor is read, by an error that is no ValueError."""
    file = copy / "model.safetensors"
    header, data = split(file)
    other = next(name for name, entry in header.items() if entry.get("shape") == header[NORM]["shape"] and name != NORM)
    header[NORM]["data_offsets"] = header[other]["data_offsets"]
    join(file, header, data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* begins -128 bytes from where .* damaged"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("metadata", [{"step": 3}, ["pt"], "pt", {"a": None}])
def test_metadata_that_safetensors_refuses_are_refused(copy: Path, metadata: object) -> None:
    file = copy / "model.safetensors"
    header, data = split(file)
    join(file, header | {"__metadata__": metadata}, data)
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the header's __metadata__ is .*expected names"):
        Checkpoint.open(copy)


@given(
    st.binary(max_size=64)
    | st.recursive(st.none() | st.integers() | st.text(max_size=4), st.lists).map(
        lambda value: json.dumps({"t": value}).encode()
    )
)
def test_arbitrary_header_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "arbitrary.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        read_header(file)


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"[]"])
def test_hostile_json_header_is_refused_by_name(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "hostile.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors: the header"):
        read_header(file)
