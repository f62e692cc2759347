"""Triton kernels on a GPU where there is one, else on the CPU by Triton's interpreter, which takes no bf16."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from kernels.native import CHOICE, native

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]  # it is for Linux


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whole models through the GPU's kernels, on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    monkeypatch.setenv(CHOICE, "triton")
    native.cache_clear()
    yield
    native.cache_clear()


def dtypes() -> list[torch.dtype]:
    """In which kernels are tried here."""
    return [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]


@pytest.fixture(params=dtypes(), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
