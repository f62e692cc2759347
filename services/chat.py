"""`shoal chat`: a conversation in the terminal."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console


def converse(options: argparse.Namespace, url: str, console: Console) -> int:
    """Stream answers; 1 when the service refused."""
    messages: list[dict[str, str]] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=None, trust_env=False) as client:
        models = client.get("/v1/models")
        if models.status_code != 200:
            console.print(f"shoal: {models.json()['error']['message']}", markup=False)
            return 1
        settings: dict[str, Any] = {"model": models.json()["data"][0]["id"], "max_tokens": options.max_tokens}
        for name in ("temperature", "seed"):
            if getattr(options, name) is not None:
                settings[name] = getattr(options, name)
        for question in [options.message] if options.message else _questions(console):
            messages.append({"role": "user", "content": question})
            answer = _ask(client, settings | {"messages": messages, "stream": True}, console)
            if answer is None:
                return 1
            messages.append({"role": "assistant", "content": answer})
    return 0


def _questions(console: Console) -> Iterator[str]:
    while True:
        try:
            question = console.input("[bold]> [/bold]")
        except EOFError:
            return
        if question.strip():
            yield question


def _ask(client: httpx.Client, body: dict[str, Any], console: Console) -> str | None:
    answer = ""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            console.print(f"shoal: {response.json()['error']['message']}", markup=False)
            return None
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                console.print(f"\nshoal: {chunk['error']['message']}", markup=False)
                return None
            text = chunk["choices"][0]["delta"].get("content", "")
            answer += text
            console.print(text, end="", markup=False)
    console.print()
    return answer
