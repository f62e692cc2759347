"""What the callers of an async actor wait for: that something, anything, has changed."""

import asyncio
import contextlib
from collections.abc import Callable


class Notice:
    """Made, and used, inside one event loop."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()

    async def until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        """Return as soon as `holds` does after a `give`, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(holds)

    async def give(self) -> None:
        """Whoever waits looks again."""
        async with self._changed:
            self._changed.notify_all()
