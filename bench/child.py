"""The inside of a contender's process: commands come as lines on stdin, one line of JSON answers each."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

PR_SET_PDEATHSIG = 1
Handler = Callable[[bytes], bytes]


def answer_commands(handlers: Mapping[str, Handler]) -> None:
    """Answer `NAME JSON` lines until stdin ends. What libraries print goes to stderr."""
    _end_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin.buffer:
        name, _, payload = line.partition(b" ")
        answers.write(handlers[name.decode()](payload) + b"\n")
        answers.flush()


def now_s() -> float:
    """The clock of every measurement."""
    return time.perf_counter()


def _end_with_parent() -> None:
    """A paused process cannot see that its parent died: let the kernel end it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
