"""What tells bases and adapters apart."""

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open

from model.adapters.errors import AdapterError
from model.checkpoint import Checkpoint
from model.tensors import expected_tensors

DIGITS = 32
SECOND = "2-"  # what identities of the second version begin with; those of the first are digits alone
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
    with ExitStack() as files:
        opened: dict[Path, Any] = {}

        def slices(name: str) -> Any:
            """Of a tensor of the file, whatever is laid over it."""
            file = base.entries[name].file
            if file not in opened:
                opened[file] = files.enter_context(safe_open(file, framework="pt"))
            return opened[file].get_slice(name)

        for name in sorted(name for name in shapes if len(shapes[name]) == 1 or name.endswith(".mlp.gate.weight")):
            digest.update(slices(name)[:].float().numpy().data)
        first = digest.hexdigest()[:DIGITS]
        for name in sorted(name for name in shapes if len(shapes[name]) == 2):
            matrix = slices(name)
            for row in (0, shapes[name][0] // 2):
                digest.update(matrix[row, :SAMPLED].float().numpy().data)
    return f"{SECOND}{digest.hexdigest()[:DIGITS]}", first


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
