"""A signal that came to nothing is raised again; one that did what it should is not."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from cluster.signals import none_lost


@pytest.fixture(autouse=True)
def exiting() -> Iterator[None]:
    """A handler as Ray's."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    yield
    signal.signal(signal.SIGTERM, before)


def lose(number: signal.Signals) -> None:
    """As where a callback's exceptions are ignored."""
    with none_lost(), contextlib.suppress(SystemExit, KeyboardInterrupt):
        os.kill(os.getpid(), number)


def fail() -> None:
    with none_lost():
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("something else")


def test_what_was_dropped_is_raised_at_the_end() -> None:
    with pytest.raises(SystemExit) as ended:
        lose(signal.SIGTERM)
    assert ended.value.code == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        lose(signal.SIGINT)


def test_what_was_raised_is_raised_once_and_another_error_comes_first() -> None:
    with pytest.raises(SystemExit), none_lost():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(ValueError, match="something else"):
        fail()
    with none_lost():
        pass
    assert signal.set_wakeup_fd(-1) == -1  # as before


def test_another_thread_hears_no_signals() -> None:
    ended = []

    def run() -> None:
        with none_lost():
            ended.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert ended == [1]
