"""What each worker does for itself, and all of them must have done before they go on together."""

from collections.abc import Callable
from typing import TypeVar

from attention.training.ranks import Ranks
from model.adapters.errors import AdapterError
from model.checkpoint import CheckpointError
from model.snapshots.errors import SnapshotError

Made = TypeVar("Made")


def together(ranks: Ranks, make: Callable[[], Made]) -> Made:
    """What `make` returns; when it fails on any worker, every one raises a SnapshotError with the first one's words.

    A worker that failed alone would leave the others waiting for it until their collective gives up.
    """
    made: list[Made] = []
    problem = ""
    try:
        made.append(make())
    except (CheckpointError, AdapterError, SnapshotError, OSError) as error:
        problem = f"worker {ranks.rank}: {error}" if ranks.world > 1 else str(error)
    problems = [each for each in ranks.gather(problem) if each]
    if problems:
        raise SnapshotError(problems[0])
    return made[0]
