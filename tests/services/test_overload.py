"""Too many requests, failing workers and clients that leave."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from tests.services.script import MODEL, Script, call, chat_body, post

CHAT = "/v1/chat/completions"


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    """The application behind a real socket."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # a client that is quicker than the server waits in the queue
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_service_says_when_to_come_back(app: FastAPI, script: Script, stream: bool) -> None:
    script.room = 0
    answer = post(app, CHAT, chat_body(stream=stream))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_an_error_response(app: FastAPI, script: Script, stream: bool) -> None:
    script.fail_after = 0
    answer = post(app, CHAT, chat_body(stream=stream))
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "the worker is gone"


def test_a_failure_in_a_stream_is_told_in_the_stream(app: FastAPI, script: Script) -> None:
    script.fail_after = 2
    lines = [line for line in post(app, CHAT, chat_body(stream=True)).text.splitlines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "the worker is gone"
    assert "[DONE]" not in lines[-1]


def test_one_choice_failing_ends_the_others(app: FastAPI, script: Script) -> None:
    script.room = 1
    assert post(app, CHAT, chat_body(n=3)).status_code == 429
    assert len(script.cancelled) == len(script.asked) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(address: str, script: Script, stream: bool) -> None:
    script.answer = script.answer * 200
    script.pause_s = 0.05
    body = json.dumps({"model": MODEL} | chat_body(stream=stream, n=2)).encode()
    url = httpx.URL(address)
    with socket.create_connection((url.host, url.port or 80), timeout=10) as client:
        client.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: shoal\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait_until(lambda: len(script.asked) == 2)
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert script.cancelled == []
    wait_until(lambda: len(script.cancelled) == 2)
    assert sorted(script.cancelled) == sorted(request.id for request in script.asked)


def test_a_client_that_leaves_before_a_streams_first_event_cancels_it(address: str, script: Script) -> None:
    script.pause_s = 3600.0
    body = json.dumps({"model": MODEL} | chat_body(stream=True)).encode()
    url = httpx.URL(address)
    with socket.create_connection((url.host, url.port or 80), timeout=10) as client:
        head = f"Host: shoal\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}".encode() + body)
        wait_until(lambda: len(script.asked) == 1)
    wait_until(lambda: len(script.cancelled) == 1)


def wait_until(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_health_follows_the_backend(app: FastAPI, script: Script) -> None:
    assert call(app, "GET", "/health").json() == {"status": "ok"}
    script.sick = "no attention worker is ready"
    answer = call(app, "GET", "/health")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "no attention worker is ready")
