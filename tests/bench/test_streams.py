"""The clients that measure a service, against a real engine's door and the real HTTP application."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from attention.runner import EngineThread
from attention.service import AttentionServer
from bench.errors import BenchError
from bench.prompts import draw_workload
from bench.service import Door
from bench.streams import measure_door, measure_http
from bench.timing import Workload
from model.tokenizer import Tokenizer
from services.api import create_app
from tests.end_to_end.clients import free_port
from tests.services.script import MODEL, Script
from tests.serving import greedy, make_engine, run
from tests.words import write_words

TOKEN = "the-token-of-this-service"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("tiny")


@pytest.fixture(scope="module")
def door(tiny: Path) -> Iterator[Door]:
    thread = EngineThread(make_engine(tiny))
    server = AttentionServer(thread, "127.0.0.1:0", TOKEN)
    server.start()
    yield Door(server.address, TOKEN)
    server.stop(0)
    thread.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_words(tmp_path_factory.mktemp("models") / "words"))


@pytest.fixture
def script(tokenizer: Tokenizer) -> Script:
    return Script(tokenizer, tokenizer.vocab_size, tokenizer.encode(" the whale swim far") * 40)


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    port = free_port()
    config = uvicorn.Config(create_app(script), host="127.0.0.1", port=port, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


def test_the_door_gives_the_engines_own_tokens(runner: asyncio.Runner, door: Door, tiny: Path) -> None:
    workload = draw_workload("door", 3, 20, 2000, 5)
    sample = measure_door(runner, door, workload)
    requests = [greedy(str(place), prompt, 6) for place, prompt in enumerate(workload.prompts)]
    expected = run(make_engine(tiny), requests)
    assert sample.answers == tuple(tuple(expected[str(place)].tokens) for place in range(3))
    assert (sample.prefill_tokens, sample.decode_tokens) == (60, 15)


def test_a_worker_that_refuses_is_an_error_and_no_figure(runner: asyncio.Runner, door: Door) -> None:
    with pytest.raises(BenchError, match="outside the vocabulary"):
        measure_door(runner, door, Workload(((10**6,),), 2))


def test_http_counts_one_event_a_token_and_hangs_up_when_done(runner: asyncio.Runner, url: str, script: Script) -> None:
    script.pause_s = 0.01  # so that the streams run beside each other
    streamed = measure_http(runner, url, MODEL, Workload(((5, 6, 7),) * 4, 8))
    assert streamed.sample.decode_tokens == 32
    assert len(streamed.latencies.first_token_s) == 4
    assert len(streamed.latencies.between_tokens_s) >= 4 * 8
    assert len(script.asked) == 4


def test_an_answer_over_http_that_fails_is_an_error_and_no_figure(
    runner: asyncio.Runner, url: str, script: Script
) -> None:
    with pytest.raises(BenchError, match="answered 404"):
        measure_http(runner, url, "another-model", Workload(((5,),), 2))
    script.fail_after = 2
    with pytest.raises(BenchError, match="the worker is gone"):
        measure_http(runner, url, MODEL, Workload(((5,),), 8))


def test_an_answer_that_ends_early_is_an_error_and_no_figure(runner: asyncio.Runner, url: str, script: Script) -> None:
    script.answer = script.answer[:3]
    with pytest.raises(BenchError, match="ended before the measurement"):
        measure_http(runner, url, MODEL, Workload(((5,),), 8))
