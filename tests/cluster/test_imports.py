"""Objects that are made while a process starts are left alone by the garbage collector, and no others."""

import gc
from collections.abc import Iterator

import pytest

from cluster.imports import kept_objects


class Cycle:
    """Only a collection can free it."""

    freed = 0

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        Cycle.freed += 1


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    Cycle.freed = 0
    yield
    gc.unfreeze()
    gc.collect()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_made_meanwhile_is_never_looked_at(fails: bool) -> None:
    try:
        with kept_objects():
            assert not gc.isenabled()
            Cycle()
            if fails:
                raise ImportError
    except ImportError:
        pass
    assert gc.isenabled()
    gc.collect()
    assert Cycle.freed == 0


def test_what_is_made_later_is_freed() -> None:
    with kept_objects():
        pass
    Cycle()
    gc.collect()
    assert Cycle.freed == 1
