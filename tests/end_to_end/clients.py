"""Helpers that talk to a running service over HTTP as its users do."""

import contextlib
import itertools
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai

TOKENS = 64
PORTS = range(20000, 32000)  # between those of Ray's workers and those that Linux gives away
TRIES = 20


def free_port() -> int:
    """One that nobody gets who asks for any port, as every process of Ray does before this one is used."""
    for port in random.sample(PORTS, TRIES):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"{TRIES} ports of {PORTS} are in use")


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)


def complete(
    api: openai.OpenAI, prompt: list[int], count: int = TOKENS, on_chunk: Callable[[], None] | None = None
) -> str:
    """`count` greedy tokens after a prompt of token ids, streamed; end tokens ignored."""
    model = api.models.list().data[0].id
    stream = api.completions.create(
        model=model, prompt=prompt, max_tokens=count, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    text = ""
    for chunk in stream:
        text += chunk.choices[0].text if chunk.choices else ""
        if on_chunk is not None:
            on_chunk()
    return text


def complete_all(
    api: openai.OpenAI,
    prompts: list[list[int]],
    count: int = TOKENS,
    midway: Callable[[], None] | None = None,
) -> list[str]:
    """All prompts at the same time; `midway` is called once, when a quarter of all tokens have come."""
    chunks = itertools.count(1)
    at = len(prompts) * count // 4

    def on_chunk() -> None:
        if next(chunks) == at and midway is not None:
            midway()

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: complete(api, prompt, count, on_chunk), prompts))


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Poll `condition`; fails the test when it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not hold within {seconds} s"
        time.sleep(0.1)
