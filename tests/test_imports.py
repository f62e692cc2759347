"""The import direction and who may import ray, read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("kernels", "model", "router", "experts", "attention", "cluster", "services", "bench")
MAY_IMPORT_RAY = {"cluster", "services", "bench"}


def imports(source: str) -> Iterator[str]:
    """Top-level package names that `source` imports, anywhere in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def violations(package: str, source: str) -> list[str]:
    left_of = set(ORDER[ORDER.index(package) + 1 :]) | {"tests"}
    forbidden = left_of if package in MAY_IMPORT_RAY else left_of | {"ray"}
    return [name for name in imports(source) if name in forbidden]


@pytest.mark.parametrize("package", ORDER)
def test_package_imports_only_what_stands_to_its_right(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): violations(package, path.read_text()) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_wrong_import_is_seen() -> None:
    assert violations("model", "from experts.host import ExpertHost") == ["experts"]
    assert violations("attention", "def f():\n    import ray.serve") == ["ray"]
    assert violations("cluster", "import ray\nfrom attention import engine") == []
    assert violations("router", "import services.app") == ["services"]
    assert violations("services", "from bench.options import parse") == ["bench"]


@pytest.mark.parametrize(
    "module", ["services.cli", "services.app", "services.pool", "services.launch", "cluster.controller"]
)
def test_what_computes_nothing_loads_no_torch(module: str) -> None:
    """It takes seconds of a start, and a quarter of a gigabyte in each of these processes."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "module", ["services.launch", "cluster.controller", "cluster.discovery", "cluster.expert_actor"]
)
def test_what_hosts_wait_for_loads_no_serve(module: str) -> None:
    """It is twice as much as Ray itself, and hosts are what a start takes longest for."""
    code = f"import sys, {module}; sys.exit('ray.serve' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
