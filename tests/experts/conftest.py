"""Fixtures of the tests of the experts."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No cycle of references is collected meanwhile: a process with much in its memory hardly ever looks for them."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
