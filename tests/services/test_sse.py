"""Events stay whole lines, and a stream whose client went away ends at once, wherever it was."""

import asyncio
import gc
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.types import Message

from services.openai.sse import event, stream

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": [], "asgi": {"spec_version": "2.3"}}


def test_no_text_breaks_an_events_line() -> None:
    text = "".join(map(chr, [*range(0x3000), 0xFEFF, 0x1F41F]))
    response = httpx.Response(200, text=event({"text": text}))
    [line] = [line for line in response.iter_lines() if line]
    assert json.loads(line.removeprefix("data: ")) == {"text": text}
    assert "é" in event({"text": "é"})


@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_cancelled_while_it_sends_it_leaves_nothing_for_the_garbage_collector(at: int) -> None:
    ended: list[str] = []

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        try:
            for number in range(100):
                yield {"number": number}
        finally:
            ended.append("events")

    async def session() -> None:
        stuck, sent = asyncio.Event(), 0

        async def send(message: Message) -> None:
            nonlocal sent
            if sent == at:
                stuck.set()
                await asyncio.Event().wait()
            sent += 1

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError("nothing is received")

        response = await stream(events())
        task = asyncio.create_task(response(SCOPE, receive, send))
        await stuck.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["events"]

    gc.disable()
    try:
        asyncio.run(asyncio.wait_for(session(), 10))
    finally:
        gc.enable()


def test_a_client_that_hangs_up_ends_it_too() -> None:
    ended: list[str] = []

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"number": 0}
            await asyncio.Event().wait()
        finally:
            ended.append("events")

    async def session() -> None:
        started = asyncio.Event()

        async def send(message: Message) -> None:
            started.set()

        async def receive() -> Message:
            await started.wait()
            return {"type": "http.disconnect"}

        await (await stream(events()))(SCOPE, receive, send)
        assert ended == ["events"]

    asyncio.run(asyncio.wait_for(session(), 10))
