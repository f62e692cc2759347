"""Attempts become snapshots whole or not at all, and nothing that somebody may need is removed."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from model.snapshots.attempt import IDLE_S, abandon, abandon_all, begin, commit
from model.snapshots.errors import SnapshotError
from model.snapshots.history import open_newest, prune, set_aside, snapshots
from model.snapshots.layout import MANIFEST
from model.snapshots.shard_file import write_shard
from tests.model.snapshot_runs import assert_whole, files, manifest, newest, write, write_files


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def age(directory: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (*directory.iterdir(), directory):
        os.utime(path, (then, then))


# Begin


def test_attempts_at_one_step_never_meet(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there" / "yet"
    first, second = begin(root, 20), begin(root, 20)
    assert first != second
    write_shard(first, "a.safetensors", {"w": torch.zeros(3)})
    assert not any(second.iterdir())
    assert open_newest(root).snapshot is None


def test_only_attempts_that_nobody_works_on_are_given_up(tmp_path: Path) -> None:
    dead, live, renamed = (begin(tmp_path, step) for step in (10, 20, 30))
    for staging in (dead, live, renamed):
        write_files(staging, 10)
        age(staging, IDLE_S + 60)
    os.utime(live / "experts-0.safetensors")  # somebody wrote to it
    os.utime(renamed)  # somebody made or renamed a file
    write(tmp_path, 40)
    assert names(tmp_path) == {live.name, renamed.name, "step-00000040"}


def test_rest_of_a_removal_is_swept(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (tmp_path / "step-00000010").rename(tmp_path / ".removed-abc")
    begin(tmp_path, 20)
    assert snapshots(tmp_path) == []
    assert not (tmp_path / ".removed-abc").exists()


def test_run_that_starts_gives_up_what_older_lives_left(tmp_path: Path) -> None:
    abandon_all(tmp_path / "none")
    write(tmp_path, 10)
    staging = begin(tmp_path, 20)
    shards = write_files(staging, 20)
    abandon_all(tmp_path)
    assert names(tmp_path) == {"step-00000010"}
    with pytest.raises(SnapshotError, match="was given up, here or elsewhere"):
        commit(staging, manifest(20, shards))
    with pytest.raises(SnapshotError, match=r"late\.safetensors cannot be written: it or its directory was given up"):
        write_shard(staging, "late.safetensors", {})
    assert_whole(newest(tmp_path))


def test_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(SnapshotError, match=r"root/\.writing-step-00000001-\w+ cannot be written: Not a directory"):
        begin(tmp_path / "root", 1)
    with pytest.raises(SnapshotError, match=r"root cannot be read: Not a directory"):
        open_newest(tmp_path / "root")


# Commit


def test_committed_snapshot_takes_no_more_files(tmp_path: Path) -> None:
    directory = write(tmp_path, 10)
    for call in (
        lambda: write_shard(directory, "late.safetensors", {}),
        lambda: abandon(directory),
        lambda: commit(directory, newest(tmp_path).manifest),
    ):
        with pytest.raises(SnapshotError, match=r"step-00000010 is no attempt"):
            call()
    assert_whole(newest(tmp_path))


def test_commit_may_be_repeated(tmp_path: Path) -> None:
    staging = begin(tmp_path, 20)
    wanted = manifest(20, write_files(staging, 20))
    assert commit(staging, wanted) == commit(staging, wanted) == tmp_path / "step-00000020"
    assert names(tmp_path) == {"step-00000020"}


def test_same_snapshot_from_a_second_attempt_changes_nothing(tmp_path: Path) -> None:
    first = write(tmp_path, 20)
    inode = first.stat().st_ino
    assert write(tmp_path, 20) == first
    assert first.stat().st_ino == inode
    assert names(tmp_path) == {"step-00000020"}


def test_other_snapshot_of_the_step_is_refused_and_both_stay(tmp_path: Path) -> None:
    write(tmp_path, 20)
    staging = begin(tmp_path, 20)
    other = manifest(20, write_files(staging, 20), "another")
    with pytest.raises(SnapshotError, match=r"step-00000020 is another snapshot of this step, of run 'run': move it"):
        commit(staging, other)
    assert_whole(newest(tmp_path))
    (tmp_path / "step-00000020").rename(tmp_path / "kept")
    assert commit(staging, other) == tmp_path / "step-00000020"
    assert newest(tmp_path).manifest.run_id == "another"


def test_broken_snapshot_of_the_step_is_set_aside(tmp_path: Path) -> None:
    directory = write(tmp_path, 20)
    (directory / "experts-0.safetensors").unlink()
    write(tmp_path, 20)
    assert_whole(newest(tmp_path))
    (aside,) = tmp_path.glob("damaged-step-00000020-*")
    assert names(aside) == {MANIFEST, *files(20)} - {"experts-0.safetensors"}


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_commit_needs_every_shard_in_its_size(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 10)
    staging = begin(tmp_path, 20)
    shards = write_files(staging, 20)
    file = staging / "experts-1.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-1])
    with pytest.raises(SnapshotError, match=r"experts-1\.safetensors (cannot be read|is \d+ bytes long; \d+ were)"):
        commit(staging, manifest(20, shards))
    assert newest(tmp_path).manifest.step == 10
    write_shard(staging, file.name, files(20)[file.name])
    commit(staging, manifest(20, shards))
    assert_whole(newest(tmp_path))


def test_files_that_nobody_reported_are_dropped(tmp_path: Path) -> None:
    staging = begin(tmp_path, 20)
    shards = write_files(staging, 20)
    write_shard(staging, "of-a-dead-host.safetensors", {"w": torch.ones(2)})
    (staging / ".experts-9.safetensors.part-abc").write_bytes(b"half")
    (staging / "directory").mkdir()
    (staging / "directory" / "file").touch()
    assert names(commit(staging, manifest(20, shards))) == {MANIFEST, *files(20)}


def test_manifest_of_another_step_is_refused(tmp_path: Path) -> None:
    staging = begin(tmp_path, 20)
    with pytest.raises(SnapshotError, match=r"the manifest is of step 21, .* was begun for step 20"):
        commit(staging, manifest(21, []))


# Prune


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    made = [write(tmp_path, step) for step in (10, 20, 30, 40)]
    staging = begin(tmp_path, 5)
    assert prune(tmp_path, 2) == made[:2]
    assert snapshots(tmp_path) == [made[3], made[2]]
    assert names(tmp_path) == {staging.name, made[2].name, made[3].name}
    assert prune(tmp_path, 2) == prune(tmp_path, 3) == []
    with pytest.raises(SnapshotError, match="keep is 0; expected how many snapshots shall stay"):
        prune(tmp_path, 0)


def test_prune_never_removes_the_only_whole_one(tmp_path: Path) -> None:
    made = [write(tmp_path, step) for step in (10, 20, 30, 40)]
    for directory in (made[0], made[2], made[3]):
        (directory / MANIFEST).unlink()
    assert prune(tmp_path, 2) == []
    assert prune(tmp_path, 1) == [made[0]]
    assert names(tmp_path) == {directory.name for directory in made[1:]}
    assert_whole(newest(tmp_path))


def test_what_was_set_aside_goes_when_newer_ones_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 10)
    aside = set_aside(write(tmp_path, 20))
    assert newest(tmp_path).manifest.step == 10
    assert prune(tmp_path, 1) == []
    write(tmp_path, 20)
    assert prune(tmp_path, 1) == [tmp_path / "step-00000010"]
    write(tmp_path, 30)
    assert set(prune(tmp_path, 1)) == {tmp_path / "step-00000020", aside}
    with pytest.raises(SnapshotError, match="is no snapshot"):
        set_aside(aside)


def test_removal_by_two_at_once_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        write(tmp_path, step)
    listed = Path.iterdir

    def vanishing(path: Path) -> list[Path]:
        entries = list(listed(path))
        if path.name.startswith(".removed-"):
            shutil.rmtree(path)
        return entries

    monkeypatch.setattr(Path, "iterdir", vanishing)
    prune(tmp_path, 1)
    monkeypatch.undo()
    assert names(tmp_path) == {"step-00000020"}
