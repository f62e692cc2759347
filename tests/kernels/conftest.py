"""Every test of the kernels runs on each instruction set of this machine, and on torch."""

from collections.abc import Iterator

import pytest

from kernels.build import INSTRUCTION_SETS, build, buildable, compiler
from kernels.native import CHOICE, native, runs_here


@pytest.fixture(autouse=True, params=[*INSTRUCTION_SETS, "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name: str = request.param
    if name != "torch":
        if name not in buildable() or not runs_here(name):
            pytest.skip(f"this machine has no {name}")
        cxx = compiler()
        if cxx is None:
            pytest.skip("no C++ compiler")
        build(name, cxx)
    monkeypatch.setenv(CHOICE, name)
    native.cache_clear()
    yield name
    native.cache_clear()
