"""Ray nodes as `ray start` makes them: own processes, which another thread than the main one may start and kill too."""

import contextlib
import itertools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from cluster.session import OBJECT_STORE_BYTES
from tests.end_to_end.clients import free_port, wait_until

HEAD = "127.0.0.2"  # for 127.0.0.1, who joins would take the machine's outer address
NUMBERS = itertools.count(3)  # of further loopback addresses
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # else a node refuses to join
    "RAY_raylet_start_wait_time_s": "60",  # a busy machine needs more than the usual 30
    "RAY_USAGE_STATS_ENABLED": "0",
}
STARTED = b"Ray runtime started"
TRIES = 5
COMMANDS = Path(sys.executable).parent


class NotStarted(RuntimeError):
    """`ray start` gave up: a raylet ends itself when its agents have not come up in 15 s."""


def start_node(address: str, arguments: list[str], environment: Mapping[str, str]) -> "RayNode":
    """A node that runs, begun again where it did not come up, as a kubelet does; raises NotStarted in the end."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(NotStarted):
            return RayNode(address, arguments, environment)
    return RayNode(address, arguments, environment)


class RayNode:
    """A process of `ray start --block`, and all that it starts.

    It is waited for: nodes that start on one machine at the same moment take the same names for their sockets.
    """

    def __init__(self, address: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.address = address
        self.id = secrets.token_hex(28)
        command = [str(COMMANDS / "ray"), "start", f"--node-ip-address={address}", *arguments, "--block"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--dashboard-agent-listen-port={free_port()}"]
        if "--head" not in arguments:
            command.append("--include-log-monitor=False")  # one a machine: the head's sees every node's files
        variables = os.environ | SETTINGS | dict(environment) | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": self.id}
        with tempfile.TemporaryFile() as said:
            self._process = subprocess.Popen(
                command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True, env=variables
            )
            wait_until(lambda: not self.alive or STARTED in _read(said), 240)
            if not self.alive:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)  # what it left
                raise NotStarted(_read(said).decode(errors="replace"))

    def kill(self) -> None:
        """SIGKILL all its processes: nothing is said to anybody."""
        for pid in (self._process.pid, *descendants(self._process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None


def _read(said: IO[bytes]) -> bytes:
    """What is in a file that another process writes, whose position there is not moved."""
    return os.pread(said.fileno(), 1 << 20, 0)


def descendants(pid: int) -> list[int]:
    """Processes that this one started, and those that they did, as long as their parents live."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(directory.name))
    found = children.get(pid, [])
    for child in found:  # which grows
        found += children.get(child, [])
    return found
