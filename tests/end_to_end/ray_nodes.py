"""Ray nodes as `ray start` makes them: own processes, which another thread than the main one may start and kill too."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.session import OBJECT_STORE_BYTES
from tests.end_to_end.clients import wait_until

HEAD = "127.0.0.2"  # for 127.0.0.1, who joins would take the machine's outer address
NUMBERS = itertools.count(3)  # of further loopback addresses


class RayNode:
    """One node that has joined the cluster at `head`, with an address of its own."""

    def __init__(self, head: str, resources: Mapping[str, float], labels: Mapping[str, str], cpus: int = 0) -> None:
        self.address = f"127.0.0.{next(NUMBERS)}"
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            f"--address={head}",
            f"--node-ip-address={self.address}",
            f"--num-cpus={cpus}",
            f"--resources={json.dumps(dict(resources))}",
            *([f"--labels={','.join(f'{name}={value}' for name, value in labels.items())}"] if labels else []),
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--block",
        ]
        environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}  # else the command refuses to join
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment
        )
        wait_until(lambda: self.id is not None, 60)

    @property
    def id(self) -> str | None:
        """Ray's id of the node; None while, or once, it is not one of the cluster's."""
        import ray

        return next((n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == self.address), None)

    def kill(self) -> None:
        """SIGKILL all its processes: nothing is said to anybody."""
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


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
