"""Signals that would be lost while something else starts that has handlers of its own."""

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator

ROOM = 4096  # signals


@contextlib.contextmanager
def none_lost() -> Iterator[None]:
    """At the end raise what a SIGTERM or SIGINT meanwhile should have, where that came to nothing.

    What a handler raises is dropped where Python happens to be in a callback, such as those around a fork. Raises
    SystemExit with the signal's number, or KeyboardInterrupt. In another thread than the main one it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, written = socket.socketpair()
    with heard, written:
        heard.setblocking(False)
        written.setblocking(False)
        before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
        try:
            numbers = heard.recv(ROOM)
        except BlockingIOError:
            return
    if signal.SIGTERM in numbers:
        raise SystemExit(int(signal.SIGTERM))
    if signal.SIGINT in numbers:
        raise KeyboardInterrupt
