"""Ending a process that does not listen, on whichever node it runs."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def _kill(pid: int, title: str) -> None:
    with contextlib.suppress(OSError):
        if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():  # else it ended, and the id is another's
            os.kill(pid, signal.SIGKILL)


async def end_process(pid: int, node: str, title: str) -> None:
    """SIGKILL an actor's process, if its title still contains `title`; a node that is gone took it along."""
    if node == ray.get_runtime_context().get_node_id():
        _kill(pid, title)
        return
    there: Any = NodeAffinitySchedulingStrategy(node, soft=False)
    with contextlib.suppress(RayError):
        await ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(pid, title)
