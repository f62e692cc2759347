"""How idle OpenMP threads wait: what is faster depends on the machine, so whoever is compared with has the choice."""

from typing import Literal

from cluster.threads import thread_environment

Waiting = Literal["active", "passive"]
WAITING: tuple[Waiting, ...] = ("active", "passive")


def waiting_environment(waiting: Waiting, threads: int) -> dict[str, str]:
    """OpenMP variables; active waiting is what torch's OpenMP does when it is told to spin."""
    if waiting == "passive":
        return thread_environment(threads)
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "ACTIVE"}
