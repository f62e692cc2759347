"""Concurrent generations of a running service, through the worker's own door and through HTTP, timed alike."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attention.requests import GenerateRequest, SamplingParams
from attention.service_client import AttentionClient
from bench.child import now_s
from bench.errors import BenchError
from bench.service import Door
from bench.timing import GenerationClock, Sample, Workload

if TYPE_CHECKING:
    import aiohttp  # which measuring without HTTP does not need

TIMEOUT_S = 1800.0
SETTLE_S = 0.3  # for a cancelled step to end
_numbers = itertools.count()
Stream = Callable[[int, tuple[int, ...]], AsyncGenerator[tuple[int, ...], None]]


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of all streams of one workload, in seconds."""

    first_token_s: tuple[float, ...]  # one a stream
    between_tokens_s: tuple[float, ...]  # one a gap


@dataclass(frozen=True, slots=True)
class Streamed:
    """Throughput as every contender's, and what single streams saw."""

    sample: Sample
    latencies: Latencies


def measure_door(runner: asyncio.Runner, door: Door, workload: Workload) -> Sample:
    """One stream of gRPC messages carries all requests, as it does from an ingress.

    One `runner` serves for all: gRPC may call into the loop in which a call began when that call is over, and where the
    loop has been closed, prints a traceback.
    """
    return runner.run(_measure_door(door, workload)).sample


def measure_http(runner: asyncio.Runner, url: str, model: str, workload: Workload) -> Streamed:
    """A streamed completion for each prompt, each on a connection of its own."""
    return runner.run(_measure_http(url, model, workload))


async def _measure_door(door: Door, workload: Workload) -> Streamed:
    client = AttentionClient(door.address, door.token)
    params = SamplingParams(max_tokens=workload.most_tokens, temperature=0.0, ignore_eos=True)

    async def stream(place: int, prompt: tuple[int, ...]) -> AsyncGenerator[tuple[int, ...], None]:
        request = GenerateRequest(f"bench-{next(_numbers)}", prompt, params)
        async with aclosing(client.generate(request)) as updates:
            async for update in updates:
                if update.error is not None:
                    raise BenchError(f"the attention worker failed: {update.error}")
                yield update.token_ids

    try:
        return await _all_streams(workload, stream)
    finally:
        await client.close()


async def _measure_http(url: str, model: str, workload: Workload) -> Streamed:
    import aiohttp

    # aiohttp parses in C: a slower client would take the service's processor time and be charged to it
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as session:

        async def stream(place: int, prompt: tuple[int, ...]) -> AsyncGenerator[tuple[int, ...], None]:
            body = {
                "model": model,
                "prompt": list(prompt),
                "max_tokens": workload.most_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
            }
            async with session.post(f"{url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise BenchError(f"the service answered {response.status}: {(await response.text())[:200]}")
                async for event in _events(response):
                    if "error" in event:
                        raise BenchError(f"a stream ended with an error: {event['error']}")
                    yield (0,)  # one event a token; its id is not said

        return await _all_streams(workload, stream)


async def _events(response: "aiohttp.ClientResponse") -> AsyncIterator[dict[str, object]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[len(b"data: ") :])


async def _all_streams(workload: Workload, stream: Stream) -> Streamed:
    """Start all streams at once, and hang up when the clock has seen enough."""
    arrivals: list[list[float]] = [[] for _ in workload.prompts]
    finished = asyncio.Event()
    started_s = now_s()
    clock = GenerationClock(workload, started_s)

    async def follow(place: int, prompt: tuple[int, ...]) -> None:
        async with aclosing(stream(place, prompt)) as pieces:
            async for tokens in pieces:
                at_s = now_s()
                arrivals[place].extend([at_s] * len(tokens))
                clock.add(place, tokens, at_s)
                if clock.done:
                    finished.set()
                    return
        if not clock.done:
            raise BenchError("an answer ended before the measurement: the model's context is too short for it")

    tasks = [asyncio.create_task(follow(place, prompt)) for place, prompt in enumerate(workload.prompts)]
    end = asyncio.create_task(finished.wait())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.wait([end, *tasks], return_when=asyncio.FIRST_COMPLETED)
            while not clock.done:
                _raise_first(tasks)
                await asyncio.wait([end, *(task for task in tasks if not task.done())], return_when="FIRST_COMPLETED")
    finally:
        for task in [end, *tasks]:
            task.cancel()
        await asyncio.gather(end, *tasks, return_exceptions=True)
    await asyncio.sleep(SETTLE_S)
    return Streamed(
        clock.sample(),
        Latencies(
            tuple(times[0] - started_s for times in arrivals),
            tuple(later - sooner for times in arrivals for sooner, later in itertools.pairwise(times)),
        ),
    )


def _raise_first(tasks: "list[asyncio.Task[None]]") -> None:
    for task in tasks:
        if task.done():
            with contextlib.suppress(asyncio.CancelledError):
                task.result()
