"""The quiet end of a command whose reader has left, as `head` does after its last line."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def while_it_is_read() -> Iterator[None]:
    """Raises SystemExit(1) once nobody reads standard output, as rich does; another broken pipe is raised on."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if _is_read():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written when Python ends
        raise SystemExit(1) from None


def _is_read() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(happened & (select.POLLERR | select.POLLHUP) for _, happened in poll.poll(0))
