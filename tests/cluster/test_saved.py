"""What a controller remembers across its own death."""

import json

import pytest

from cluster.saved import Committed, SavedState
from router.holding import Holding

STATE = SavedState(
    epoch=12,
    generations={"host-0": 3, "host-1": 1, "host-9": 4},
    committed=Committed(Holding({1: (("host-0",), ("host-1", "host-0"))}), ("host-0", "host-1"), 1, 1),
    changes=5,
)


def test_it_comes_back_as_it_was() -> None:
    assert SavedState.from_json(STATE.to_json()) == STATE


@pytest.mark.parametrize("field", ["epoch", "generations", "committed", "changes"])
def test_nothing_may_be_missing(field: str) -> None:
    raw = json.loads(STATE.to_json())
    del raw[field]
    with pytest.raises(KeyError):
        SavedState.from_json(json.dumps(raw))
