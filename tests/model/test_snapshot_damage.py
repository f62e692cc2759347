"""No damage to a snapshot goes unnoticed or unnamed, and an older one is found behind it."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.snapshots.errors import SnapshotBroken, SnapshotError
from model.snapshots.history import open_newest, prune
from model.snapshots.layout import MANIFEST
from model.snapshots.manifest import decode
from model.snapshots.snapshot import Snapshot
from tests.model.snapshot_runs import assert_whole, files, newest, same, skipped, tensors, write


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots of steps 10 and 20."""
    root = tmp_path_factory.mktemp("made")
    write(root, 10)
    write(root, 20)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """`made`, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "root"))


def flip(path: Path, position: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


def test_any_flipped_byte_of_a_shard_is_found_and_named(root: Path) -> None:
    directory = root / "step-00000020"
    for name, held in files(20).items():
        file = directory / name
        whole = file.read_bytes()
        for position in {*range(0, len(whole), 17), 0, 7, 8, len(whole) - 1}:
            flip(file, position)
            opened = newest(root)
            with pytest.raises(SnapshotBroken, match=rf"{re.escape(str(file))} is damaged"):
                next(opened.tensors(list(held)))
            with pytest.raises(SnapshotBroken, match=re.escape(str(file))):
                opened.verify()
            file.write_bytes(whole)
    assert_whole(newest(root))


def test_a_shard_that_was_read_before_it_was_damaged_is_not_read_again(root: Path) -> None:
    name, held = next(iter(files(20).items()))
    opened = newest(root)
    next(opened.tensors(list(held)))
    flip(root / "step-00000020" / name, -1)
    with pytest.raises(SnapshotBroken, match=re.escape(name)):
        opened.verify()
    with pytest.raises(SnapshotBroken, match=re.escape(name)):
        next(opened.tensors(list(held)))


def test_damage_elsewhere_stops_no_reader(root: Path) -> None:
    flip(root / "step-00000020" / "experts-0.safetensors", -1)
    (tensor,) = newest(root).tensors(["1.2.up"])
    assert same(tensor, tensors(20)["1.2.up"])


def test_any_flipped_byte_of_the_manifest_is_found(made: Path) -> None:
    path = made / "step-00000020" / MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bits in (1, 0x20, 0x80):
            content = bytearray(whole)
            content[position] ^= bits
            with pytest.raises(SnapshotBroken, match=re.escape(str(path))):
                decode(bytes(content), path)


def test_manifest_written_in_part_is_found(made: Path) -> None:
    path = made / "step-00000020" / MANIFEST
    whole = path.read_bytes()
    for length in range(len(whole)):
        with pytest.raises(SnapshotBroken, match="cut short or damaged"):
            decode(whole[:length], path)


@pytest.mark.parametrize("name", [MANIFEST, *files(20)])
@pytest.mark.parametrize("damage", ["cut", "emptied", "longer", "missing", "a directory"])
def test_broken_snapshot_is_passed_over_with_a_reason(root: Path, name: str, damage: str) -> None:
    file = root / "step-00000020" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "a directory":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"cut": content[:-1], "emptied": b"", "longer": content + b"\n"}[damage])
    found = open_newest(root)
    assert str(file) in skipped(found)
    assert found.snapshot is not None
    assert found.snapshot.manifest.step == 10
    assert_whole(found.snapshot)


def test_renamed_snapshot_and_stray_names_are_not_taken_for_the_newest(root: Path) -> None:
    (root / "step-00000020").rename(root / "step-00000030")
    for name in ("step-40", "step-000000040", "step-00000040.bak", "last", ".writing-step-00000050-abc"):
        (root / name).mkdir()
    found = open_newest(root)
    assert "step-00000030 holds step 20" in skipped(found)
    assert newest(root).manifest.step == 10


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert open_newest(tmp_path / "none") == open_newest(tmp_path)
    assert open_newest(tmp_path).snapshot is None
    assert prune(tmp_path / "none", 1) == []


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step)
    assert newest(tmp_path).manifest.step == 100_000_000


def resealed(path: Path, **changes: object) -> None:
    """The manifest as another release might write it: its own checksum holds."""
    document = {**json.loads(path.read_bytes()), **changes}
    del document["sha256"]
    body = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")


@pytest.mark.parametrize("call", [open_newest, lambda root: prune(root, 1), lambda root: write(root, 20)])
def test_unknown_version_is_refused_by_name_and_kept(root: Path, call: Callable[[Path], object]) -> None:
    path = root / "step-00000020" / MANIFEST
    resealed(path, version=2, more={"of": "the future"})
    with pytest.raises(SnapshotError, match=r"step-00000020/manifest\.json is of format 'shoal-snapshot' version 2; e"):
        call(root)
    assert {entry.name for entry in root.glob("step-*")} == {"step-00000010", "step-00000020"}


def test_sealed_manifest_with_wrong_fields_is_broken(root: Path) -> None:
    path = root / "step-00000020" / MANIFEST
    whole = path.read_bytes()
    changes: dict[str, Any]
    for changes, complaint in (
        ({"step": "x"}, "step"),
        ({"more": 1}, "more"),
        ({"shards": [{"name": "../x.safetensors", "nbytes": 1, "sha256": "", "tensors": []}]}, "shard name"),
        ({"shards": [{"name": "x.safetensors", "nbytes": 1, "sha256": "", "tensors": [], "odd": 1}]}, "odd"),
    ):
        path.write_bytes(whole)
        resealed(path, **changes)
        with pytest.raises(SnapshotBroken, match=complaint):
            Snapshot.open(path.parent)


def test_trouble_that_may_pass_is_not_taken_for_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SnapshotError, match=r"manifest\.json cannot be read: Permission denied") as caught:
        open_newest(root)
    assert not isinstance(caught.value, SnapshotBroken)


def test_snapshot_removed_under_its_reader_is_named(root: Path) -> None:
    opened = newest(root)
    shutil.rmtree(opened.directory)
    with pytest.raises(SnapshotBroken, match=r"experts-0\.safetensors cannot be read: No such file"):
        next(opened.tensors(["1.0.up"]))
