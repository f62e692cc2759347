"""What tells bases and adapters apart."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from model.adapters.errors import AdapterError
from model.checkpoint import Checkpoint
from model.tensors import expected_tensors

DIGITS = 32


def base_identity(base: Checkpoint) -> str:
    """Hex digits over the shapes of all tensors and the values, as fp32, of the norms and the gates.

    It reads megabytes and tells most trainings of one model apart, which `Checkpoint.fingerprint` does not; LoRA that
    was merged into the base is seen only where it changed a gate. It stays when a base is sharded anew or converted to
    wider numbers, and from one version of this program to the next.
    """
    digest = hashlib.sha256()
    shapes = expected_tensors(base.config)
    for name in sorted(shapes):
        digest.update(f"{name} {list(shapes[name])}\n".encode())
    small = sorted(name for name in shapes if len(shapes[name]) == 1 or name.endswith(".mlp.gate.weight"))
    for values in Checkpoint.tensors(base, small):  # the files', whatever is laid over them
        digest.update(values.float().contiguous().numpy().data)
    return digest.hexdigest()[:DIGITS]


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
