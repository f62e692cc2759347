"""What tells bases and adapters apart."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import safe_open

from model.adapters.errors import AdapterError
from model.checkpoint import Checkpoint
from model.safetensors_header import CheckpointError, TensorEntry
from model.tensors import expected_tensors

DIGITS = 32
SECOND = "2-"  # what identities of the second version begin with; those of the first are digits alone
PIECE = 4096  # bytes of a tensor's beginning and of its middle
SAMPLED = 1024  # numbers of each of two rows of a matrix, the first and the middle one


def base_identity(base: Checkpoint) -> str:
    """Hex digits, under a version, over all tensors' shapes, norms and gates whole, and two pieces of every matrix.

    They are of the values as fp32: it stays when a base is sharded anew or converted to wider numbers, and from one
    version of this program to the next. It tells trainings of one model apart, LoRA or a delta that was merged into the
    base included, which `Checkpoint.fingerprint` does not. Of a matrix it reads a few KB, and each file is opened once.
    """
    return base_identities(base)[0]


def base_identities(base: Checkpoint) -> tuple[str, str]:
    """`base_identity`, and what the first version of it would be, which knows matrices by their shapes alone.

    What was written under either is of this base.
    """
    digest = hashlib.sha256()
    shapes = expected_tensors(base.config)
    for name in sorted(shapes):
        digest.update(f"{name} {list(shapes[name])}\n".encode())
    small = sorted(name for name in shapes if len(shapes[name]) == 1 or name.endswith(".mlp.gate.weight"))
    matrices = sorted(name for name in shapes if len(shapes[name]) == 2)
    tensors = _slices(base, (*small, *matrices))
    for tensor in islice(tensors, len(small)):
        digest.update(tensor[:].float().numpy().data)
    first = digest.hexdigest()[:DIGITS]
    for matrix, name in zip(tensors, matrices, strict=True):
        for row in (0, shapes[name][0] // 2):
            digest.update(matrix[row, :SAMPLED].float().numpy().data)
    return f"{SECOND}{digest.hexdigest()[:DIGITS]}", first


def dense_identity(base: Checkpoint) -> str:
    """Hex digits over pieces, as stored, of all that is not in routed experts; for processes that have no torch.

    It is little to read of the largest model. Raises CheckpointError naming a file that cannot be read.
    """
    digest = hashlib.sha256()
    by_file: dict[Path, list[TensorEntry]] = {}
    for name in sorted(expected_tensors(base.config)):
        if ".mlp.experts." not in name:
            by_file.setdefault(base.entries[name].file, []).append(base.entries[name])
    for path, entries in by_file.items():
        try:
            with path.open("rb", buffering=0) as file:
                for entry in entries:
                    for place in (0, entry.nbytes // 2):
                        digest.update(os.pread(file.fileno(), min(PIECE, entry.nbytes - place), entry.offset + place))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read any more: {error.strerror}") from error
    return digest.hexdigest()[:DIGITS]


def _slices(base: Checkpoint, names: Iterable[str]) -> Iterator[Any]:
    """Tensors of the files, whatever is laid over them, to take pieces of; each file is opened once."""
    with ExitStack() as files:
        opened: dict[Path, Any] = {}
        for name in names:
            file = base.entries[name].file
            if file not in opened:
                opened[file] = files.enter_context(safe_open(file, framework="pt"))
            yield opened[file].get_slice(name)


def content_digest(files: Iterable[Path]) -> str:
    """Hex digits over all that is in the files; raises AdapterError naming one that cannot be read."""
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise AdapterError(f"{path} cannot be read any more: {error.strerror}") from error
    return digest.hexdigest()[:DIGITS]
