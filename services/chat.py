"""`shoal chat`: a conversation in the terminal."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console

from services.commands import CommandError, authorization


def converse(options: argparse.Namespace, url: str, console: Console) -> int:
    """Stream answers; 1 when the service refused the one question. A conversation goes on without what was refused."""
    messages: list[dict[str, str]] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    headers = authorization(options.api_key, "the API key") if options.api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=None, trust_env=False) as client:
        models = client.get("/v1/models")
        if models.status_code != 200:
            return _refused(models)
        settings: dict[str, Any] = {"model": _served(models)}
        for name in ("max_tokens", "temperature", "seed"):
            if getattr(options, name) is not None:
                settings[name] = getattr(options, name)
        for question in _questions(console) if options.message is None else [options.message]:
            messages.append({"role": "user", "content": question})
            answer = _ask(client, settings | {"messages": messages, "stream": True})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
            elif options.message is not None:
                return 1
            else:
                messages.pop()
    return 0


def _questions(console: Console) -> Iterator[str]:
    while True:
        try:
            question = console.input("[bold]> [/bold]")
            question.encode()
        except EOFError:
            return
        except UnicodeError as error:
            raise CommandError(f"a line of standard input cannot be sent, as it is no UTF-8: {error}") from None
        if question.strip():
            yield question


def _served(models: httpx.Response) -> str:
    try:
        return str(models.json()["data"][0]["id"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise CommandError(f"{models.url} names no model: is it the address of a service of Shoal's?") from None


def _ask(client: httpx.Client, body: dict[str, Any]) -> str | None:
    """The answer, which is printed as it is written: no console that wraps lines, or reads more into them."""
    answer = ""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            _refused(response)
            return None
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                print()
                print(f"shoal: {chunk['error']['message']}", file=sys.stderr)
                return None
            text = chunk["choices"][0]["delta"].get("content", "")
            if not answer:
                text = text.lstrip()  # DeepSeek's template writes a space of its own before what is sent back
            answer += text
            print(text, end="", flush=True)
    print()
    return answer


def _refused(response: httpx.Response) -> int:
    """Say why; the exit status."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):  # not the application: a proxy that does not find it yet
        message = f"{response.url} answered {response.status_code}; it may still be starting"
    print(f"shoal: {message}", file=sys.stderr)
    return 1
