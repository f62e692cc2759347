"""Fixtures of every test: one thread, and checkpoints written once a run."""

import ctypes
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as cluster/session.py, whichever imports ray first
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:  # no GPU: its kernels run in Triton's interpreter, which has to be said before anybody imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

MakeCheckpoint = Callable[[str], Path]

settings.register_profile("untimed", deadline=None)  # a busy machine breaks no promise
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`checkpoint("tiny")`: the directory of a seeded random checkpoint, written on first use."""
    from tests.checkpoints import EVERY_SHAPE, write_checkpoint

    written: dict[str, Path] = {}

    def make(shape: str) -> Path:
        if shape not in written:
            written[shape] = write_checkpoint(EVERY_SHAPE[shape], tmp_path_factory.mktemp(shape)).path
        return written[shape]

    return make


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a checkpoint that says words, with its tokenizer."""
    from tests.words import write_words

    return write_words(tmp_path_factory.mktemp("models") / "bundled")
