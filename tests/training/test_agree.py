"""What one worker cannot do, all of them end with, and none waits for it."""

import pytest

from model.checkpoint import CheckpointError
from model.snapshots.errors import SnapshotError
from services.training.agree import together


class Two:
    """Worker 0 of two; what the other says is known beforehand."""

    rank, world = 0, 2

    def __init__(self, other: str = "") -> None:
        self.other = other
        self.told: list[str] = []

    def gather(self, message: str) -> list[str]:
        self.told.append(message)
        return [message, self.other]


def fail() -> None:
    raise CheckpointError("/m/config.json does not exist")


def test_all_go_on_where_all_have_done_it() -> None:
    ranks = Two()
    assert together(ranks, lambda: 5) == 5  # type: ignore[arg-type]
    assert ranks.told == [""]


def test_what_fails_here_is_told_to_the_others() -> None:
    ranks = Two()
    with pytest.raises(SnapshotError, match="worker 0: "):
        together(ranks, fail)  # type: ignore[arg-type]
    assert ranks.told == ["worker 0: /m/config.json does not exist"]


def test_what_fails_elsewhere_ends_this_one_too() -> None:
    with pytest.raises(SnapshotError, match="worker 1: no such file"):
        together(Two("worker 1: no such file"), lambda: 5)  # type: ignore[arg-type]
