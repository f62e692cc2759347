"""One thread budget a node, and threads that sleep while they wait.

An idle OpenMP team that spins slows its neighbours by an order of magnitude, and every actor brings one.
"""

import os


def node_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def host_threads(hosts: int, nodes: int) -> int:
    """Threads of each of `hosts` expert hosts that are spread over `nodes` like this one: they compute together."""
    return max(1, node_threads() // -(-hosts // nodes))


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of an actor that computes with `threads` threads; raises ValueError below 1."""
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "GOMP_SPINCOUNT": "0",
    }
