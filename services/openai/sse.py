"""Server-sent events, and work that ends when its client goes away."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from services.openai.errors import as_api_error, error_body

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def event(data: dict[str, Any] | str) -> str:
    """One event. What Unicode knows as line ends is escaped: many clients split the stream there, httpx among them."""
    if not isinstance(data, str):
        data = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        if not data.isascii():  # a look at each character costs more than all else here
            data = data.translate(LINE_ENDS)
    return f"data: {data}\n\n"


class _EventStream(StreamingResponse):
    """Closes what makes the events when it ends, however it ends.

    A task that is cancelled while it sends leaves its generators where they yielded, and whatever feeds them goes on
    until the garbage collector comes by.
    """

    def __init__(self, body: AsyncGenerator[str, None], events: AsyncGenerator[dict[str, Any], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self._body = body
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events), aclosing(self._body):
            await super().__call__(scope, receive, send)


async def stream(events: AsyncGenerator[dict[str, Any], None]) -> StreamingResponse:
    """A streaming response. What fails before the first event is raised, to be answered with its own status."""
    first = await anext(events)

    async def body() -> AsyncGenerator[str, None]:
        yield event(first)
        try:
            async for item in events:
                yield event(item)
        except Exception as error:  # noqa: BLE001  the status line is gone: say it in the stream
            known = as_api_error(error)
            yield event(error_body(known.message, known.status, known.param, known.code))
            return
        yield event("[DONE]")

    return _EventStream(body(), events)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it when the client disconnects; raises ClientGone then."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
