"""One file of tensors: a safetensors container, written and hashed in one pass, read tensor by tensor."""

import contextlib
import itertools
import json
import os
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from model.safetensors_header import MAX_HEADER_BYTES
from model.snapshots import disk
from model.snapshots.attempt import abandon
from model.snapshots.errors import DiskFull, SnapshotBroken, SnapshotError
from model.snapshots.layout import check_attempt, check_shard_name
from model.snapshots.manifest import Shard
from model.snapshots.reading import reading

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"

Named = Sequence[tuple[str, Tensor]]


def write_shard(staging: Path, name: str, tensors: Mapping[str, Tensor]) -> Shard:
    """Write one file of an attempt, from any process or thread; `tensors` must not change meanwhile.

    What is contiguous on the CPU is written from where it is; of the others, one at a time is copied. Writing a name
    again replaces it, so a call may be repeated.

    Raises SnapshotError when the attempt was given up, or a tensor cannot be stored; DiskFull, after giving up the
    attempt for everyone, which frees what it took.
    """
    check_attempt(staging)
    check_shard_name(name)
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps each aligned
    header = _header(ordered)
    nbytes = len(header) + sum(tensor.nbytes for _, tensor in ordered)
    try:
        sha256 = disk.write_file(
            staging / name, itertools.chain([header], (_bytes(tensor) for _, tensor in ordered)), nbytes
        )
    except DiskFull:
        with contextlib.suppress(SnapshotError):  # the full disk is what must be told
            abandon(staging)
        raise
    return Shard(name, nbytes, sha256, tuple(tensor for tensor, _ in ordered))


class ShardFile:
    """A file whose checksum was verified, open for reading; a context manager.

    Tensors are read, not mapped: where a mapped file is removed on another machine, touching the tensor would end the
    process. Raises SnapshotBroken or SnapshotError naming the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with reading(path):
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            self._entries, self._begin = self._read_header()
        except SnapshotError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def tensor(self, name: str) -> Tensor:
        """A tensor of its own memory, on the CPU."""
        match self._entries.get(name):
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                dtype in DTYPES and end - begin == prod(shape) * DTYPES[dtype].itemsize
            ):
                tensor = torch.empty(shape, dtype=DTYPES[dtype])
                self._read_into(_bytes(tensor), self._begin + begin)
                return tensor
            case entry:
                raise SnapshotBroken(f"{self._path}: the header's entry for {name} is malformed: {entry!r:.200}")

    def _read_header(self) -> tuple[Mapping[str, object], int]:
        prefix = bytearray(8)
        self._read_into(memoryview(prefix), 0)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise SnapshotBroken(f"{self._path}: the header claims {length} bytes; it is not safetensors")
        header = bytearray(length)
        self._read_into(memoryview(header), 8)
        try:
            entries = json.loads(header)
        except (ValueError, RecursionError) as error:
            raise SnapshotBroken(f"{self._path}: the header is not JSON ({error})") from error
        if not isinstance(entries, dict):
            raise SnapshotBroken(f"{self._path}: the header is a JSON {type(entries).__name__}; expected an object")
        return entries, 8 + length

    def _read_into(self, buffer: memoryview, begin: int) -> None:
        done = 0
        while done < len(buffer):
            with reading(self._path):
                count = os.preadv(self._file.fileno(), [buffer[done:]], begin + done)
            if count == 0:
                raise SnapshotBroken(f"{self._path} is truncated: it ends before byte {begin + len(buffer)}")
            done += count


def _header(tensors: Named) -> bytes:
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    begin = 0
    for name, tensor in tensors:
        if name == _METADATA or tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _NAMES:
            raise SnapshotError(
                f"tensor {name} of {tensor.dtype}, {tensor.layout} on {tensor.device} cannot be stored; expected a "
                f"dense one of {', '.join(_NAMES.values())}, not named {_METADATA}"
            )
        end = begin + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise SnapshotError(f"the names of {len(tensors)} tensors take {len(encoded)} bytes; use several shards")
    return struct.pack("<Q", len(encoded)) + encoded


def _bytes(tensor: Tensor) -> memoryview:
    """The memory itself of a contiguous tensor on the CPU; of a copy where it is another."""
    dense = tensor.detach().contiguous().cpu()
    flat = dense.as_strided((dense.numel(),), (1,))  # view() minds the strides of dimensions of size 0 and 1
    return flat.view(torch.uint8).numpy().data
