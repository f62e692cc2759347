"""Server-sent events, and work that ends when its client goes away."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from services.openai.errors import as_api_error, error_body
from services.openai.large_json import EVENT, json_parts

Event = dict[str, Any] | bytes  # its data, or all of it as it is sent
T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


LINE_ENDS = {char: f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
MANY_TOKENS = 16  # log-probabilities of so many take a few milliseconds to write


def event(data: dict[str, Any] | str) -> str:
    """One event. What Unicode knows as line ends is escaped: many clients split the stream there, httpx among them."""
    return f"data: {data if isinstance(data, str) else _one_line(EVENT.encode(data))}\n\n"


async def event_of(tokens: int, make: Callable[[], dict[str, Any]]) -> Event:
    """What `make` makes of so many tokens; of many, it makes it beside the event loop, and it is written there."""
    return make() if tokens <= MANY_TOKENS else await asyncio.to_thread(lambda: _large_event(make()))


def _large_event(data: dict[str, Any]) -> bytes:
    """The bytes of `event`."""
    return b"".join([b"data: ", *(_one_line(part).encode() for part in json_parts(data, EVENT)), b"\n\n"])


def _one_line(text: str) -> str:
    for char, escape in LINE_ENDS.items():
        if char in text:
            text = text.replace(char, escape)
    return text


class _EventStream(StreamingResponse):
    """Closes what makes the events when it ends, however it ends.

    A task that is cancelled while it sends leaves its generators where they yielded, and whatever feeds them goes on
    until the garbage collector comes by.
    """

    def __init__(self, body: AsyncGenerator[str | bytes, None], events: AsyncGenerator[Event, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self._body = body
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events), aclosing(self._body):
            await super().__call__(scope, receive, send)


async def stream(events: AsyncGenerator[Event, None]) -> StreamingResponse:
    """A streaming response. What fails before the first event is raised, to be answered with its own status."""
    first = await anext(events)

    async def body() -> AsyncGenerator[str | bytes, None]:
        yield _sent(first)
        try:
            async for item in events:
                yield _sent(item)
        except Exception as error:  # noqa: BLE001  the status line is gone: say it in the stream
            known = as_api_error(error)
            yield event(error_body(known.message, known.status, known.param, known.code))
            return
        yield event("[DONE]")

    return _EventStream(body(), events)


def _sent(item: Event) -> str | bytes:
    return item if isinstance(item, bytes) else event(item)


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
