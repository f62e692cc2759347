"""The file that is written from parts: what safetensors reads from it is what was put, and little is held meanwhile."""

import io
import struct
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file

from model.adapters.tensor_file import NAMES, TensorFile
from model.safetensors_header import read_header

DTYPES = list(NAMES)


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), min_size=1, max_size=3)), min_size=1),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_safetensors_reads_what_was_put_in_any_order(
    shapes: list[tuple[torch.dtype, list[int]]], random: Random
) -> None:
    tensors = {
        f"t{number}": torch.arange(torch.Size(shape).numel()).view(shape).to(dtype) + number
        for number, (dtype, shape) in enumerate(shapes)
    }
    raw = io.BytesIO()
    file = TensorFile(raw, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    parts = [(name, slice(row, row + 1)) for name, tensor in tensors.items() for row in range(len(tensor))]
    random.shuffle(parts)
    for name, rows in parts:
        file.put(name, tensors[name][rows], (rows,))
    read = load(raw.getvalue())
    (header_bytes,) = struct.unpack("<Q", raw.getvalue()[:8])
    assert header_bytes % 8 == 0, "numbers must lie where they can be mapped"
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_our_own_header_check_accepts_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as raw:
        file = TensorFile(raw, {"a": (torch.bfloat16, (3,)), "b": (torch.float32, (2, 5))})
        file.put("a", torch.ones(3))
        file.put("b", torch.arange(10.0).view(5, 2).t())
    assert {name: entry.shape for name, entry in read_header(path).items()} == {"a": (3,), "b": (2, 5)}
    assert torch.equal(load_file(path)["b"], torch.arange(10.0).view(5, 2).t())


def test_what_is_whole_and_in_turn_is_on_disk_at_once() -> None:
    raw = io.BytesIO()
    file = TensorFile(raw, dict.fromkeys("abc", (torch.float32, (4, 2))))
    header = raw.tell()
    sizes = []
    for name, rows in (("b", (0, 4)), ("a", (0, 2)), ("a", (2, 4)), ("c", (0, 4))):
        index = slice(*rows)
        file.put(name, torch.ones(4, 2)[index], (index,))
        sizes.append(raw.tell() - header)
    assert sizes == [0, 0, 64, 96]


def test_a_part_of_another_shape_is_a_bug() -> None:
    file = TensorFile(io.BytesIO(), {"a": (torch.float32, (4, 2))})
    with pytest.raises(AssertionError, match="a: "):
        file.put("a", torch.ones(1, 2))
