"""Helpers that talk to a running service over HTTP as its users do."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai

TOKENS = 64


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)


def complete(api: openai.OpenAI, prompt: list[int], count: int = TOKENS) -> str:
    """`count` greedy tokens after a prompt of token ids, streamed; end tokens ignored."""
    model = api.models.list().data[0].id
    stream = api.completions.create(
        model=model, prompt=prompt, max_tokens=count, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def complete_all(api: openai.OpenAI, prompts: list[list[int]], count: int = TOKENS) -> list[str]:
    """All prompts at the same time."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: complete(api, prompt, count), prompts))


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll `condition`; fails the test when it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not hold within {seconds} s"
        time.sleep(0.1)
