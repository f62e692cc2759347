"""Many streams of a running service at once: every token and log-probability of each, and when it came."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TIMEOUT_S = 240.0


@dataclass(slots=True)
class Stream:
    """What one client saw."""

    tokens: dict[int, list[tuple[str, str]]] = field(default_factory=dict)  # by choice: text and log-probability
    finish_reasons: dict[int, str] = field(default_factory=dict)
    events: list[tuple[float, int]] = field(default_factory=list)  # when each came, and its tokens
    error: str | None = None

    @property
    def answer(self) -> tuple[object, ...]:
        """All that must not differ between two runs."""
        return (self.tokens, self.finish_reasons, self.error)

    def stall_s(self, since_s: float) -> float:
        """The longest that the stream stood still after `since_s`, a time of the monotonic clock.

        A service holds tokens back until their bytes are characters; an event of several tokens is late by that.
        """
        if len(self.events) < 2:
            return 0.0
        usual_s = (self.events[-1][0] - self.events[0][0]) / sum(tokens for _, tokens in self.events[1:])
        pairs = zip(self.events, self.events[1:], strict=False)
        waits = (later - sooner - (tokens - 1) * usual_s for (sooner, _), (later, tokens) in pairs if later > since_s)
        return max(0.0, max(waits, default=0.0))


Body = dict[str, Any]


def run_streams(
    url: str,
    bodies: Sequence[Body],
    midway: Callable[[], None] | None = None,
    after: float = 0.25,
    key: str | None = None,
) -> tuple[list[Stream], float]:
    """POST every body to /v1/completions at once, streamed; `midway` runs in a thread of its own when the share
    `after` of all events has come. Also when it began, by the monotonic clock."""
    return asyncio.run(_run(url, bodies, midway, after, key))


async def _run(
    url: str, bodies: Sequence[Body], midway: Callable[[], None] | None, after: float, key: str | None
) -> tuple[list[Stream], float]:
    streams = [Stream() for _ in bodies]
    at = int(after * sum(body["max_tokens"] * body.get("n", 1) for body in bodies))
    seen, began_s = 0, float("inf")
    thread: threading.Thread | None = None

    def on_event() -> None:
        nonlocal seen, began_s, thread
        seen += 1
        if seen == at and midway is not None:
            began_s = time.monotonic()
            thread = threading.Thread(target=midway)
            thread.start()

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(TIMEOUT_S)
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        await asyncio.gather(
            *(_follow(session, url, body, stream, on_event) for body, stream in zip(bodies, streams, strict=True))
        )
    if thread is not None:
        await asyncio.to_thread(thread.join)
    return streams, began_s


async def _follow(
    session: aiohttp.ClientSession, url: str, body: Body, stream: Stream, on_event: Callable[[], None]
) -> None:
    try:
        async with session.post(f"{url}/v1/completions", json=body | {"stream": True, "logprobs": 1}) as response:
            if response.status != 200:
                stream.error = f"{response.status}: {(await response.text())[:300]}"
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _take(stream, json.loads(line[len(b"data: ") :]))
                    on_event()
    except (aiohttp.ClientError, TimeoutError) as error:
        stream.error = f"{type(error).__name__}: {error}"


def _take(stream: Stream, event: dict[str, Any]) -> None:
    if "error" in event:
        stream.error = str(event["error"])
        return
    tokens = 0
    for choice in event["choices"]:
        scores = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
        told = [(text, repr(value)) for text, value in zip(scores["tokens"], scores["token_logprobs"], strict=True)]
        stream.tokens.setdefault(choice["index"], []).extend(told)
        tokens += len(told)
        if choice["finish_reason"]:
            stream.finish_reasons[choice["index"]] = choice["finish_reason"]
    stream.events.append((time.monotonic(), max(1, tokens)))
