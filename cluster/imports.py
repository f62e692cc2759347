"""What a process imports as it starts stays until it ends, and need not be looked at for garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_objects() -> Iterator[None]:
    """No collection runs meanwhile, and none later looks at what is there by then.

    torch alone makes some hundred thousand objects: looked at again and again, they are a seventh of the time that its
    import takes; and whoever is served would wait while a full collection looks at all of them.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
