"""A snapshot, opened by its manifest; tensors are read by name, from files whose checksum is verified first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from model.snapshots.errors import SnapshotBroken, SnapshotError
from model.snapshots.layout import MANIFEST
from model.snapshots.manifest import Manifest, Shard, decode
from model.snapshots.reading import check_size, reading, sha256_of

if TYPE_CHECKING:  # whoever reads no tensors needs no torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Holds no tensors. What it raises is SnapshotBroken where the disk's content is at fault, else SnapshotError."""

    directory: Path
    manifest: Manifest
    _placed: Mapping[str, Shard] = field(repr=False, compare=False)
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)  # names of shards

    @classmethod
    def open(cls, directory: Path) -> Snapshot:
        """Read and check the manifest only; who wants to know that all files are there asks `check_sizes`."""
        path = directory / MANIFEST
        with reading(path):
            raw = path.read_bytes()
        manifest = decode(raw, path)
        placed = {tensor: shard for shard in manifest.shards for tensor in shard.tensors}
        return cls(directory, manifest, placed)

    def where(self, name: str) -> Shard:
        """The shard that holds a tensor."""
        shard = self._placed.get(name)
        if shard is None:
            raise SnapshotError(f"{self.directory} has no tensor {name}: it is of another model or way of training")
        return shard

    def tensors(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Read tensors one at a time, in order, onto the CPU; ask for those of one shard together.

        A shard is verified once, before the first tensor of it is read, and the others are not touched.
        """
        return self._read([(name, self.where(name)) for name in names])

    def check_sizes(self) -> None:
        """See that every shard is there, in its size."""
        for shard in self.manifest.shards:
            check_size(self.directory / shard.name, shard.nbytes)

    def verify(self) -> None:
        """Read every byte and compare checksums, of shards that were verified before too."""
        self._verified.clear()
        for shard in self.manifest.shards:
            self._verify(shard)

    def check_same_run(self, *, fingerprint: str, run_id: str | None = None) -> None:
        """Refuse a snapshot of another model, or of another run where `run_id` is given."""
        manifest = self.manifest
        if manifest.fingerprint != fingerprint:
            raise SnapshotError(
                f"{self.directory} is of a model with fingerprint {manifest.fingerprint}, this one has {fingerprint}: "
                "give the model that it was trained from, or another directory for snapshots"
            )
        if run_id is not None and manifest.run_id != run_id:
            raise SnapshotError(
                f"{self.directory} is of run {manifest.run_id!r}, this one is {run_id!r}: "
                "give another directory for snapshots"
            )

    def _read(self, wanted: Sequence[tuple[str, Shard]]) -> Iterator[Tensor]:
        from model.snapshots.shard_file import ShardFile

        for shard, group in itertools.groupby(wanted, key=lambda item: item[1]):
            if shard.name not in self._verified:
                self._verify(shard)
            with ShardFile(self.directory / shard.name) as file:
                for name, _ in group:
                    yield file.tensor(name)

    def _verify(self, shard: Shard) -> None:
        path = self.directory / shard.name
        check_size(path, shard.nbytes)
        found = sha256_of(path)
        if found != shard.sha256:
            raise SnapshotBroken(
                f"{path} is damaged: its SHA-256 is {found}, {shard.sha256} was written; "
                "set this snapshot aside and resume from an older one"
            )
        self._verified.add(shard.name)
