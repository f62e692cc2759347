"""A safetensors file's header, checked before any weight is read."""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class CheckpointError(ValueError):
    """The checkpoint on disk cannot be used; the message names the file or tensor and the fix."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies, as its file's header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int  # in bytes, from the beginning of the file

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of one file; raises CheckpointError when it is cut short or its header lies."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is {size} bytes long, too short for safetensors: fetch it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes of {size - 8} in the file; "
                    "it is truncated or not safetensors: fetch it again"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        raw = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); the file is damaged") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(raw).__name__}; expected an object")
    metadata = raw.get("__metadata__")
    if metadata is not None and not _texts(metadata):
        raise CheckpointError(f"{path}: the header's __metadata__ is {metadata!r:.200}; expected names and texts")
    data_bytes = size - 8 - length
    entries = {
        name: _entry(path, name, value, size - data_bytes, data_bytes)
        for name, value in raw.items()
        if name != "__metadata__"
    }
    covered = sum(entry.nbytes for entry in entries.values())
    if covered != data_bytes:
        raise CheckpointError(
            f"{path}: the tensors cover {covered} of {data_bytes} bytes of data, off by "
            f"{abs(data_bytes - covered)} bytes; the file is damaged: fetch it again"
        )
    end = size - data_bytes
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise CheckpointError(
                f"{path}: {name} begins {entry.offset - end:+} bytes from where the tensor before it ends; "
                "the file is damaged: fetch it again"
            )
        end += entry.nbytes
    return entries


def _texts(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())


def _entry(path: Path, name: str, raw: object, start: int, data_bytes: int) -> TensorEntry:
    match raw:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if all(
            type(n) is int and n >= 0 for n in shape
        ):
            pass
        case _:
            raise CheckpointError(f"{path}: the header's entry for {name} is malformed: {raw!r:.200}")
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}; expected one of {', '.join(ITEM_BYTES)}")
    wanted = prod(shape) * ITEM_BYTES[dtype]
    if begin < 0 or end - begin != wanted:
        raise CheckpointError(f"{path}: {name} of shape {shape} {dtype} needs {wanted} bytes, not {end - begin}")
    if end > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {end} of {data_bytes} bytes of data: fetch it again"
        )
    return TensorEntry(path, tuple(shape), dtype, start + begin)
