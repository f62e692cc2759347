"""The manifest comes back as it was, or is refused before it is written."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.snapshots.errors import DiskFull, SnapshotBroken, SnapshotError
from model.snapshots.manifest import Manifest, Shard, decode, encode
from tests.model.snapshot_runs import manifest

ROOT = Path(__file__).parents[2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(value=st.dictionaries(st.text(), json_values))
def test_manifest_comes_back_as_it_was(value: dict[str, Any]) -> None:
    written = Manifest(
        step=3, run_id="r", fingerprint="f", position=value, recipe=value, rng=value, shards=(), extra=value
    )
    assert decode(encode(written), Path("manifest.json")) == written


@pytest.mark.parametrize(
    "value", [{1: 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": float("inf")}, {"a": torch.ones(1)}, [], {"a": {1}}]
)
def test_what_json_changes_is_refused_by_field(value: Any) -> None:
    with pytest.raises(SnapshotError, match=r"^recipe "):
        Manifest(step=1, run_id="r", fingerprint="f", position={}, recipe=value, rng={}, shards=())


def test_tensor_or_shard_that_is_there_twice_is_refused() -> None:
    one, two = Shard("a.safetensors", 1, "0", ("w",)), Shard("b.safetensors", 1, "0", ("w",))
    with pytest.raises(SnapshotError, match="tensor w is there 2 times"):
        manifest(1, [one, two])
    with pytest.raises(SnapshotError, match=r"shard a\.safetensors is there 2 times"):
        manifest(1, [one, one])


@pytest.mark.parametrize(("step", "run_id"), [(-1, "r"), (1, "")])
def test_step_and_run_are_needed(step: int, run_id: str) -> None:
    with pytest.raises(SnapshotError, match=r"step is -1|run_id is empty"):
        manifest(step, [], run_id)


@pytest.mark.parametrize("kind", [SnapshotError, SnapshotBroken, DiskFull])
def test_errors_cross_processes(kind: type[SnapshotError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("reason")))  # noqa: S301 - as Ray does with errors
    assert (type(copy), str(copy)) == (kind, "reason")


def test_looking_at_snapshots_loads_no_torch() -> None:
    code = "import sys, model.snapshots.history, model.snapshots.attempt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
