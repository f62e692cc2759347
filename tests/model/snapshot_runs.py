"""A small training run's snapshots, to be read back bit for bit, and an `os` for their writer that may fail."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.snapshots import disk, removal
from model.snapshots.attempt import begin, commit
from model.snapshots.history import Newest, open_newest
from model.snapshots.manifest import Manifest, Shard
from model.snapshots.shard_file import write_shard
from model.snapshots.snapshot import Snapshot

FINGERPRINT = "0123456789abcdef"


def files(step: int) -> dict[str, dict[str, Tensor]]:
    """Tensors by file name: two expert hosts and one worker, other values at every step."""
    draw = torch.Generator().manual_seed(step)
    return {
        "experts-0.safetensors": {
            f"1.{expert}.{name}": torch.randn(4, 6, generator=draw) for expert in (0, 1) for name in ("up", "up.mean")
        },
        "experts-1.safetensors": {"1.2.up": torch.randn(3, 5, generator=draw).bfloat16()},
        "dense-0.safetensors": {
            "embed": torch.randn(5, 7, generator=draw).T,
            "seen": torch.tensor(step),
            "none": torch.empty(0, 3),
        },
    }


def tensors(step: int) -> dict[str, Tensor]:
    return {name: tensor for held in files(step).values() for name, tensor in held.items()}


def manifest(step: int, shards: Sequence[Shard], run_id: str = "run") -> Manifest:
    return Manifest(
        step=step,
        run_id=run_id,
        fingerprint=FINGERPRINT,
        position={"epoch": 0, "sample": step * 8},
        recipe={"lr": 3e-4, "only": [[1, 0], [1, 1]], "lora": None},
        rng={"seed": 7, "state": "00ff"},
        shards=tuple(shards),
    )


def write(root: Path, step: int, run_id: str = "run") -> Path:
    staging = begin(root, step)
    return commit(staging, manifest(step, write_files(staging, step), run_id))


def write_files(staging: Path, step: int) -> list[Shard]:
    return [write_shard(staging, name, held) for name, held in files(step).items()]


def newest(root: Path) -> Snapshot:
    found = open_newest(root)
    assert found.snapshot is not None, found
    return found.snapshot


def skipped(found: Newest) -> str:
    """Why the one snapshot that was passed over was."""
    (reason,) = found.skipped
    return reason


def assert_whole(snapshot: Snapshot) -> None:
    """It verifies, and holds what was written for its step."""
    snapshot.verify()
    wanted = tensors(snapshot.manifest.step)
    assert snapshot.manifest == manifest(snapshot.manifest.step, snapshot.manifest.shards)
    for name, tensor in zip(wanted, snapshot.tensors(wanted), strict=True):
        assert same(tensor, wanted[name]), name


def same(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    fresh = (one.clone(memory_format=torch.contiguous_format).reshape(-1) for one in (left, right))
    return torch.equal(*(one.view(torch.uint8) for one in fresh))


class Os:
    """`os`, where `before(number, call, *arguments)` is told of every change to the file system before it is made."""

    def __init__(self, before: Callable[..., None]) -> None:
        self.before = before
        self.changes = 0

    def __getattr__(self, name: str) -> object:
        call = getattr(os, name)
        return self._changing(name, call) if name in {"write", "fsync", "rename", "mkdir", "unlink", "rmdir"} else call

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._changing("open", lambda _: None)(path)
        return os.open(path, flags, mode)

    def _changing(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def changing(*arguments: object) -> object:
            self.changes += 1
            self.before(self.changes, name, *arguments)
            return None if name == "fsync" else call(*arguments)  # it shows only after a power cut, and takes time

        return changing


def install(patch: pytest.MonkeyPatch, fake: Os) -> None:
    for module in (disk, removal):
        patch.setattr(module, "os", fake)


def count_changes(job: Callable[[], object]) -> int:
    """Changes to the file system that `job` makes."""
    counting = Os(lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, counting)
        job()
    return counting.changes
