"""Whatever change to the file system is the last one, or fails, the newest whole snapshot loads bit for bit."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.snapshots import disk
from model.snapshots.attempt import abandon_all, begin
from model.snapshots.errors import DiskFull, SnapshotError
from model.snapshots.history import prune, snapshots
from model.snapshots.layout import ATTEMPT
from model.snapshots.shard_file import write_shard
from model.snapshots.snapshot import Snapshot
from tests.model.snapshot_disk import SimulatedDisk
from tests.model.snapshot_process import work
from tests.model.snapshot_runs import Os, assert_whole, count_changes, install, newest, write, write_files

ROOT = Path(__file__).parents[2]
CHUNK_BYTES = disk.CHUNK_BYTES


class Crash(BaseException):
    """The process is no more: nothing that it would still do is done."""


@pytest.fixture(autouse=True)
def _small_chunks_and_nothing_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Os(lambda *_: None))
    monkeypatch.setattr(disk, "CHUNK_BYTES", 300)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of step 10."""
    root = tmp_path_factory.mktemp("old") / "root"
    write(root, 10)
    return root


def copies(old: Path, at: Path) -> list[Path]:
    """A copy of `old` for each change that a run makes at its next snapshot."""
    changes = count_changes(lambda: work(Path(shutil.copytree(old, at / "dry"))))
    return [Path(shutil.copytree(old, at / f"{number}")) for number in range(1, changes + 1)]


def assert_usable(root: Path) -> int:
    """Every snapshot is whole, and the next attempt succeeds; the newest step that was found."""
    found = newest(root)
    for directory in snapshots(root):
        assert_whole(Snapshot.open(directory))
    abandon_all(root)
    work(root)
    assert_whole(newest(root))
    assert [path.name for path in root.iterdir()] == ["step-00000020"]
    return found.manifest.step


def test_crash_at_any_change_leaves_a_whole_snapshot(old: Path, tmp_path: Path) -> None:
    steps = []
    for change, root in enumerate(copies(old, tmp_path), 1):

        def before(number: int, call: str, *arguments: object, last: int = change) -> None:
            if number < last:
                return
            if number == last and call == "write":
                handle, chunk = arguments
                assert isinstance(handle, int)
                assert isinstance(chunk, bytes | memoryview)
                os.write(handle, chunk[: len(chunk) // 2])
            raise Crash

        with pytest.MonkeyPatch.context() as patch:
            install(patch, Os(before))
            with pytest.raises(Crash):
                work(root)
        steps.append(assert_usable(root))
    assert set(steps) == {10, 20}
    assert steps == sorted(steps)


def test_sigkill_at_any_change_leaves_a_whole_snapshot(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "CHUNK_BYTES", CHUNK_BYTES)  # as in the process
    shutil.copytree(old, tmp_path / "root")
    changes = count_changes(lambda: work(Path(shutil.copytree(old, tmp_path / "dry"))))
    command = [sys.executable, "-m", "tests.model.snapshot_process", "kill", str(tmp_path / "root"), str(changes)]
    subprocess.run(command, cwd=ROOT, check=True)
    steps = [assert_usable(tmp_path / f"root.{change}") for change in range(1, changes + 1)]
    assert set(steps) == {10, 20}


def test_power_cut_at_any_change_leaves_a_whole_snapshot(old: Path, tmp_path: Path) -> None:
    """Of what was not synced, any part may be lost: contents, and the names in each directory."""
    root = Path(shutil.copytree(old, tmp_path / "root"))
    disk_model = SimulatedDisk(root)
    recorder = Os(disk_model.before)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, recorder)
        write(root, 20)
        committed = recorder.changes
        prune(root, 1)
    images = list(disk_model.images())
    assert images[-1][0] == recorder.changes
    seen = set()
    for number, (change, image) in enumerate(images):
        at = tmp_path / f"image-{number}"
        image.write(at)
        found = newest(at)
        assert_whole(found)
        assert found.manifest.step == 20 or change < committed
        seen.add((found.manifest.step, change < committed))
    assert seen == {(10, True), (20, True), (20, False)}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_failing_change_is_told_and_costs_only_the_attempt(old: Path, tmp_path: Path, number: int) -> None:
    changes = count_changes(lambda: write(Path(shutil.copytree(old, tmp_path / "dry")), 20))
    for change in range(1, changes + 1):
        root = Path(shutil.copytree(old, tmp_path / f"{change}"))

        def before(count: int, *_: object, failing: int = change) -> None:
            if count == failing:
                raise OSError(number, os.strerror(number))

        with pytest.MonkeyPatch.context() as patch:
            install(patch, Os(before))
            with pytest.raises(SnapshotError, match=str(root)) as caught:
                write(root, 20)
        if number != errno.EIO:
            assert isinstance(caught.value, DiskFull)
            assert "the disk is full" in str(caught.value)
            assert not any(path.name.startswith(ATTEMPT) for path in root.iterdir())
        assert_whole(newest(root))
        assert_usable(root)


def test_full_disk_is_told_with_what_is_needed(old: Path, tmp_path: Path) -> None:
    """Here the system itself refuses to let a file grow, after a part of it was written."""
    root = Path(shutil.copytree(old, tmp_path / "root"))
    staging = begin(root, 20)
    write_files(staging, 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskFull, match=r"big\.safetensors cannot be .* needs \d{4} bytes, \d+ bytes are free"):
            write_shard(staging, "big.safetensors", {"w": torch.ones(500)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in root.iterdir()] == ["step-00000010"]
    with pytest.raises(SnapshotError, match=r"other\.safetensors cannot be written: it or its directory was given up"):
        write_shard(staging, "other.safetensors", {})
    assert_usable(root)
