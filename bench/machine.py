"""Where and with what a run was made. Names no host, user or path."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cluster.threads import node_threads

PACKAGES = ("torch", "transformers", "ray", "grpcio", "nixl", "nixl-cu12", "nixl-cu13", "tokenizers", "numpy")
GIT_TIMEOUT_S = 10.0


class Machine(BaseModel):
    """The hardware and the kernel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cores: int  # that this process may use
    memory_bytes: int
    kernel: str


class Software(BaseModel):
    """Versions; a package that is not installed is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    packages: dict[str, str]
    commit: str  # "unknown" outside a git checkout
    uncommitted_changes: bool


def read_machine() -> Machine:
    return Machine(
        cpu=_cpu_name(Path("/proc/cpuinfo").read_text()),
        cores=node_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
    )


def read_software() -> Software:
    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    # what the benchmark itself writes does not count
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs", ":!README.md")
    return Software(
        python=platform.python_version(),
        packages=packages,
        commit=commit or "unknown",
        uncommitted_changes=bool(changed),
    )


def _cpu_name(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _git(*arguments: str) -> str:
    """Output of git in the directory of this package; "" when there is no git or no checkout."""
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
