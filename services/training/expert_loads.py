"""How many rows each expert got since the run began, kept across its lives."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.snapshots import disk

LOADS = "loads.json"
KEPT = 8  # checkpoints: a run may resume from one before its newest


@dataclass(frozen=True, slots=True)
class Counted:
    """Rows of each expert [layers, experts], int64, and of how many steps they are."""

    steps: int
    rows_LE: NDArray[np.int64]


class ExpertLoads:
    """A sum over steps. What was saved is the file's business: {"checkpoints": {step: {"steps", "rows"}}}."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        """Goes on from the newest checkpoint up to that step; from nothing where there is none.

        Raises ValueError when the file holds anything else.
        """
        self._path = path
        self._checkpoints = {step: counted for step, counted in _read(path).items() if step <= resumed_at}
        self._now = self._checkpoints[max(self._checkpoints)] if self._checkpoints else None

    @property
    def counted(self) -> Counted | None:
        """None before the first step."""
        return self._now

    def add(self, rows_LE: NDArray[np.int64]) -> None:
        """A step's rows, all workers'. Raises ValueError, and adds nothing, when there were other experts before."""
        rows_LE = np.asarray(rows_LE)
        if rows_LE.ndim != 2 or rows_LE.dtype != np.int64:
            raise ValueError(f"rows are {rows_LE.dtype} {list(rows_LE.shape)}; expected int64 [layers, experts]")
        if self._now is None:
            self._now = Counted(1, rows_LE.copy())
            return
        if rows_LE.shape != self._now.rows_LE.shape:
            raise ValueError(
                f"the step has rows of {list(rows_LE.shape)} layers and experts, the steps before it, in {self._path}, "
                f"of {list(self._now.rows_LE.shape)}: give a run of another model another directory"
            )
        self._now = Counted(self._now.steps + 1, self._now.rows_LE + rows_LE)

    def save(self, step: int) -> None:
        """Keep the sum as that of `step`. Raises SnapshotError when it cannot be written; the file stays as it was."""
        if self._now is None:
            return
        checkpoints = self._checkpoints | {step: self._now}
        newest = dict(sorted(checkpoints.items())[-KEPT:])
        document = {
            str(at): {"steps": counted.steps, "rows": counted.rows_LE.tolist()} for at, counted in newest.items()
        }
        raw = json.dumps({"checkpoints": document}).encode()
        disk.write_file(self._path, [raw], len(raw))
        self._checkpoints = newest


def _read(path: Path) -> dict[int, Counted]:
    try:
        document: Any = json.loads(path.read_bytes())
        return {int(step): _counted(each) for step, each in document["checkpoints"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} is no count of the experts' loads ({error}): remove it, and they are counted anew"
        ) from error


def _counted(document: Any) -> Counted:
    """Raises what its parts raise."""
    rows_LE = np.array(document["rows"])
    if rows_LE.ndim != 2 or rows_LE.dtype != np.int64 or rows_LE.min(initial=0) < 0:
        raise ValueError(f"rows are {rows_LE.dtype} {list(rows_LE.shape)}; expected counts [layers, experts]")
    return Counted(int(document["steps"]), rows_LE)
