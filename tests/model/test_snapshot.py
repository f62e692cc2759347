"""A snapshot that many wrote is read back bit for bit by whoever needs a part of it."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.snapshots import snapshot
from model.snapshots.attempt import begin, commit
from model.snapshots.errors import SnapshotError
from model.snapshots.layout import MANIFEST
from model.snapshots.manifest import Shard
from model.snapshots.reading import sha256_of
from model.snapshots.shard_file import write_shard
from model.snapshots.snapshot import Snapshot
from tests.model.snapshot_runs import FINGERPRINT, files, manifest, newest, same, tensors, write, write_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots of steps 10 and 20."""
    root = tmp_path_factory.mktemp("made")
    write(root, 10)
    write(root, 20)
    return root


def test_threads_and_processes_write_one_attempt(tmp_path: Path) -> None:
    staging = begin(tmp_path, 5)

    def write_here(number: int) -> Shard:
        return write_shard(staging, f"here-{number}.safetensors", {f"{number}": torch.ones(number)})

    names = ["experts-0", "experts-1", "experts-1"]  # the last two write the same files
    command = [sys.executable, "-m", "tests.model.snapshot_process", "write", str(staging), "20", *names]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as others:
        with ThreadPoolExecutor(4) as threads:
            here = list(threads.map(write_here, range(20)))
        lines = others.communicate()[0].splitlines()
    assert others.returncode == 0
    assert len(lines) == 60
    told = dict(line.split() for line in lines)
    assert len(told) == 40
    for name, sha256 in told.items():
        assert hashlib.sha256((staging / name).read_bytes()).hexdigest() == sha256
        kind, number = name.removesuffix(".safetensors").rsplit("-", 1)
        wanted = files(int(number))[f"{kind}.safetensors"]
        assert all(same(tensor, wanted[key]) for key, tensor in load_file(staging / name).items())
    commit(staging, manifest(5, here))
    assert {path.name for path in (tmp_path / "step-00000005").iterdir()} == {MANIFEST, *(shard.name for shard in here)}


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_any_number_of_readers_takes_what_it_needs(made: Path, readers: int) -> None:
    wanted = tensors(20)
    for reader in range(readers):
        mine = sorted(wanted)[reader::readers]
        opened = Snapshot.open(made / "step-00000020")
        read = dict(zip(mine, opened.tensors(mine), strict=True))
        assert all(same(read[name], wanted[name]) for name in mine)
        assert [opened.where(name).name for name in mine] == [
            next(file for file, held in files(20).items() if name in held) for name in mine
        ]


def test_unknown_tensor_is_refused_before_anything_is_read(made: Path) -> None:
    with pytest.raises(SnapshotError, match=r"step-00000020 has no tensor 1\.9\.up"):
        newest(made).tensors(["embed", "1.9.up"])


def test_shard_is_verified_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def hashing(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(snapshot, "sha256_of", hashing)
    opened = newest(made)
    for _ in range(2):
        assert len(list(opened.tensors(["1.0.up", "1.1.up", "1.2.up", "1.0.up.mean"]))) == 4
    assert hashed == ["experts-0.safetensors", "experts-1.safetensors"]


def test_read_tensor_has_its_own_memory(tmp_path: Path) -> None:
    file = write(tmp_path, 20) / "experts-0.safetensors"
    (tensor,) = newest(tmp_path).tensors(["1.0.up"])
    file.write_bytes(b"\0" * file.stat().st_size)
    assert same(tensor, tensors(20)["1.0.up"])
    tensor.zero_()


def test_other_model_and_other_run_are_refused_by_name(made: Path) -> None:
    opened = newest(made)
    opened.check_same_run(fingerprint=FINGERPRINT)
    opened.check_same_run(fingerprint=FINGERPRINT, run_id="run")
    with pytest.raises(SnapshotError, match=r"step-00000020 is of a model with fingerprint 0123456789abcdef, .* beef"):
        opened.check_same_run(fingerprint="beef")
    with pytest.raises(SnapshotError, match=r"step-00000020 is of run 'run', this one is 'walk'"):
        opened.check_same_run(fingerprint=FINGERPRINT, run_id="walk")


def test_same_content_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 20)
    content = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "step-00000020").iterdir()} for name in ("a", "b")
    ]
    assert content[0] == content[1]
    assert write_files(begin(tmp_path, 20), 20) == list(newest(tmp_path / "a").manifest.shards)
