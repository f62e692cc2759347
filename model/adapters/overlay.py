"""A checkpoint as adapters change it: whoever reads tensors from it need not know that there are any."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING

from model.adapters import delta, lora_config
from model.adapters.delta import Delta, read_delta
from model.adapters.errors import AdapterError
from model.adapters.identity import content_digest
from model.adapters.lora_read import Adapter, read_adapter
from model.checkpoint import Checkpoint
from model.tensors import expected_tensors

if TYPE_CHECKING:  # whoever reads no weights needs no torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class MergedCheckpoint(Checkpoint):
    """A checkpoint under adapters, which apply in their order. Entries are the base's, and so are all dtypes."""

    adapters: tuple[Adapter | Delta, ...] = ()

    def tensors(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Read and change tensors one at a time, in order; of each adapter, only what belongs to them is read."""
        with ExitStack() as files:
            changes = [files.enter_context(adapter.opened()) for adapter in self.adapters]
            asked, read = tee(names)
            for name, tensor in zip(asked, Checkpoint.tensors(self, read), strict=True):
                for change in changes:
                    tensor = change(name, tensor)
                yield tensor

    def fingerprint(self) -> str:
        """Sixteen hex digits over the base's and all that is in the adapters' files, which are read for it."""
        digest = hashlib.sha256(Checkpoint.fingerprint(self).encode())  # super() fails in dataclasses with slots
        for adapter in self.adapters:
            digest.update(content_digest(adapter.files).encode())
        return digest.hexdigest()[:16]

    def stamps(self) -> dict[str, tuple[int, int]]:
        """The base's by file name, and those of the adapters' files by whole path."""
        found = Checkpoint.stamps(self)
        for file in (file for adapter in self.adapters for file in adapter.files):
            try:
                status = file.stat()
            except OSError as error:
                raise AdapterError(f"{file} cannot be read any more: {error.strerror}") from error
            found[str(file)] = (status.st_size, status.st_mtime_ns)
        return found


def open_with_adapters(directory: Path | str, adapters: Sequence[Path | str] = ()) -> Checkpoint:
    """Open a checkpoint under LoRA adapters and deltas, in the order in which they apply: LoRA adds, a delta replaces.

    Raises what `Checkpoint.open` raises, and AdapterError when an adapter cannot be read, does not fit, is given twice
    or replaces what one before it changed.
    """
    base = Checkpoint.open(directory)
    opened: list[Adapter | Delta] = []
    for path in adapters:
        adapter = _open(Path(path).absolute(), base)
        if any(adapter.directory.samefile(other.directory) for other in opened):
            raise AdapterError(f"{path} is given twice")
        if isinstance(adapter, Delta):
            _check_order(adapter, opened)
        opened.append(adapter)
    return MergedCheckpoint(base.directory, base.config, base.entries, tuple(opened)) if opened else base


def merged_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name, read one at a time, for `export_checkpoint`."""
    names = list(expected_tensors(checkpoint.config))
    yield from zip(names, checkpoint.tensors(names), strict=True)


def _open(directory: Path, base: Checkpoint) -> Adapter | Delta:
    if not directory.is_dir():
        raise AdapterError(f"{directory} is no directory: give that of a LoRA adapter or of a delta")
    if (directory / delta.FILE).exists():
        return read_delta(directory, base)
    if (directory / lora_config.FILE).exists():
        return read_adapter(directory, base.config)
    raise AdapterError(f"{directory} is no adapter: it has neither {lora_config.FILE} nor {delta.FILE}")


def _check_order(later: Delta, before: Iterable[Adapter | Delta]) -> None:
    for earlier in before:
        lost = next((name for name in later.entries if earlier.changes(name)), None)
        if lost is not None:
            raise AdapterError(
                f"{later.directory} replaces {lost}, and {earlier.directory} changed it before: "
                "give the delta first, or one of the two"
            )
