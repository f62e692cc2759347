"""The worker's door over gRPC: updates in order, cancellation, and strangers kept out."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import anyio
import grpc
import pytest

from attention.replay import Replay
from attention.requests import GenerateRequest, SamplingParams, TokenLogprob, Update
from attention.runner import EngineThread
from attention.service import AttentionServer, _Stream
from attention.service_client import AttentionClient, WorkerLost
from attention.wire import METHOD
from experts.wire import identity
from tests.serving import greedy, make_engine, run

TOKEN = "the-token-of-this-service"


@pytest.fixture(scope="module")
def thread(checkpoint: Callable[[str], Path]) -> Iterator[EngineThread]:
    made = EngineThread(make_engine(checkpoint("tiny"), 2))
    yield made
    made.close()


@pytest.fixture
def server(thread: EngineThread) -> Iterator[AttentionServer]:
    made = AttentionServer(thread, "127.0.0.1:0", TOKEN)
    made.start()
    yield made
    made.stop(0)


def talk(address: str, use: Callable[[AttentionClient], Awaitable[None]], token: str | None = TOKEN) -> None:
    async def session() -> None:
        client = AttentionClient(address, token)
        try:
            await use(client)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(session(), 60))


async def collect(client: AttentionClient, request: GenerateRequest) -> tuple[list[int], str | None, str | None]:
    tokens: list[int] = []
    reason = error = None
    async for update in client.generate(request):
        tokens.extend(update.token_ids)
        reason, error = update.finish_reason, update.error
    return tokens, reason, error


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never became so")


def test_many_requests_on_one_stream_get_their_own_tokens(
    server: AttentionServer, checkpoint: Callable[[str], Path]
) -> None:
    requests = [greedy(str(n), [30 + n, 40, 50], 10) for n in range(8)]
    expected = run(make_engine(checkpoint("tiny"), 1), requests)

    async def use(client: AttentionClient) -> None:
        answers = await asyncio.gather(*(collect(client, request) for request in requests))
        assert [tokens for tokens, _, _ in answers] == [expected[request.id].tokens for request in requests]
        assert client.in_flight == 0

    talk(server.address, use)


def test_leaving_a_stream_cancels_and_frees(server: AttentionServer, thread: EngineThread) -> None:
    async def use(client: AttentionClient) -> None:
        async with aclosing(client.generate(greedy("long", [9, 8, 7], 2000))) as updates:
            await anext(updates)
            assert thread.stats().blocks_owned > 0
        await until(lambda: thread.stats().blocks_owned == 0)

    talk(server.address, use)


def test_an_ingress_that_vanishes_frees_what_it_had(server: AttentionServer, thread: EngineThread) -> None:
    async def use(client: AttentionClient) -> None:
        updates: AsyncGenerator[object, None] = client.generate(greedy("long", [9, 8, 7], 2000))
        await anext(updates)
        client._stream.cancel()
        with pytest.raises(WorkerLost):
            async for _ in updates:
                pass
        await until(lambda: thread.stats().blocks_owned == 0)

    talk(server.address, use)


@pytest.mark.parametrize("meanwhile", [False, True], ids=["before it is submitted", "as it is submitted"])
def test_a_request_that_was_read_as_its_ingress_vanished_is_cancelled(
    thread: EngineThread, monkeypatch: pytest.MonkeyPatch, meanwhile: bool
) -> None:
    """A long prompt takes its time to be parsed."""
    stream = _Stream(thread)
    submit = thread.submit

    def close_first(request: GenerateRequest, on_update: Callable[[Update], None]) -> None:
        if meanwhile:
            stream.close()
            asyncio.run(until(lambda: not thread._cancelled))
        submit(request, on_update)

    monkeypatch.setattr(thread, "submit", close_first)
    if not meanwhile:
        stream.close()
    stream.read(iter([json.dumps({"submit": greedy("long", [9, 8, 7], 4000).to_json_dict()}).encode()]))
    asyncio.run(until(lambda: not thread.busy))


def test_a_bad_request_is_an_error_of_its_own(server: AttentionServer) -> None:
    bad = GenerateRequest("bad", (99999,), SamplingParams(max_tokens=3))

    async def use(client: AttentionClient) -> None:
        (wrong, right) = await asyncio.gather(collect(client, bad), collect(client, greedy("good", [5, 6], 5)))
        assert wrong[1] == "error"
        assert "token id 99999" in str(wrong[2])
        assert (len(right[0]), right[1]) == (5, "length")

    talk(server.address, use)


@pytest.mark.parametrize("token", [None, "another"])
def test_the_door_needs_the_token(server: AttentionServer, token: str | None) -> None:
    async def use(client: AttentionClient) -> None:
        with pytest.raises(WorkerLost, match="UNAUTHENTICATED"):
            await collect(client, greedy("a", [5], 1))

    for _ in range(50):  # gRPC would forget the status of some, did the client write before it is accepted
        talk(server.address, use, token)


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xfe",
        b"{}",
        b'{"submit": {"id": "x"}}',
        b'{"submit": {"id": "x", "prompt_ids": ["5"], "params": {"max_tokens": 1}}}',
        b'{"submit": {"id": "x", "prompt_ids": [5], "params": {"max_tokens": 1, "logit_bias": [[Infinity, 1]]}}}',
        b"[1]",
        b"[" * 100_000,
        json.dumps(3).encode(),
    ],
)
def test_a_malformed_message_ends_only_its_stream(server: AttentionServer, message: bytes) -> None:
    async def use(client: AttentionClient) -> None:
        running = asyncio.create_task(collect(client, greedy("good", [5, 6], 30)))
        await asyncio.to_thread(send_raw)
        assert len((await running)[0]) == 30

    def send_raw() -> None:
        with grpc.insecure_channel(server.address) as channel:
            call = channel.stream_stream(METHOD, identity, identity)
            assert list(call(iter([message]), metadata=(("shoal-token", TOKEN),), timeout=20)) == []

    talk(server.address, use)


def test_a_worker_that_stops_is_lost_to_its_clients(thread: EngineThread) -> None:
    server = AttentionServer(thread, "127.0.0.1:0", TOKEN)
    server.start()

    async def use(client: AttentionClient) -> None:
        updates = client.generate(greedy("long", [9, 8, 7], 3000))
        await anext(updates)
        await asyncio.to_thread(server.stop, 0)
        with pytest.raises(WorkerLost):
            async for _ in updates:
                pass
        assert not client.alive

    talk(server.address, use)


def test_a_request_that_is_cancelled_leaves_the_others_alone(server: AttentionServer, thread: EngineThread) -> None:
    """As an HTTP server cancels: whatever the request awaits from now on is cancelled, too."""
    stays = greedy("stays", [3, 4, 5], 60)

    async def leave(client: AttentionClient, name: str) -> None:
        with anyio.CancelScope() as scope:
            async with aclosing(client.generate(greedy(name, [7, 8], 2000))) as updates:
                async for _ in updates:
                    scope.cancel()

    async def use(client: AttentionClient) -> None:
        other = asyncio.create_task(collect(client, stays))
        for number in range(3):
            await leave(client, f"cancelled-{number}")
        tokens, reason, error = await other
        assert (len(tokens), reason, error) == (60, "length", None)
        assert client.alive
        await until(lambda: thread.stats().blocks_owned == 0)
        assert thread.stats().blocks_owned == 0

    talk(server.address, use)


def test_a_lost_worker_is_told_once(server: AttentionServer) -> None:
    lost: list[str] = []

    async def session() -> None:
        client = AttentionClient(server.address, TOKEN, on_lost=lambda: lost.append("lost"))
        await collect(client, greedy("a", [3], 1))
        server.stop(0)
        await until(lambda: not client.alive)
        await client.close()

    asyncio.run(asyncio.wait_for(session(), 60))
    assert lost == ["lost"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_requests_of_an_engine_that_fails_are_lost_and_not_wrong(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(checkpoint("tiny"), 1)
    thread = EngineThread(engine)
    server = AttentionServer(thread, "127.0.0.1:0", TOKEN)
    server.start()

    def fail() -> None:
        raise RuntimeError("the device has fallen off the bus")

    async def use(client: AttentionClient) -> None:
        updates = client.generate(greedy("long", [9, 8, 7], 3000))
        await anext(updates)
        monkeypatch.setattr(engine, "step", fail)
        with pytest.raises(WorkerLost, match="fallen off the bus") as lost:
            async for _ in updates:
                pass
        assert lost.value.failed
        assert not client.alive

    async def ask(client: AttentionClient) -> None:
        with pytest.raises(WorkerLost, match="has ended") as lost:
            await collect(client, greedy("later", [5], 1))
        assert not lost.value.failed

    async def both(client: AttentionClient) -> None:
        """Another's stream, which had nothing under way when the engine failed."""
        other = AttentionClient(server.address, TOKEN)
        assert (await collect(other, greedy("before", [5], 1)))[1] == "length"
        await use(client)
        with pytest.raises(WorkerLost, match=r"shutting down|has ended"):
            await collect(other, greedy("after", [5], 1))
        await other.close()

    talk(server.address, both)
    talk(server.address, ask)
    server.stop(0)


def test_a_replay_asks_for_the_rest_and_hides_what_is_known() -> None:
    score = TokenLogprob(5, -1.0)
    request = GenerateRequest("a", (1, 2, 3), SamplingParams(max_tokens=9, prompt_logprobs=0))
    replay = Replay(request)
    assert replay.begin() == request
    assert replay.take(Update("a", prompt_logprobs=(None, score))).prompt_logprobs == (None, score)
    second = replay.begin()
    assert (second.resumed_ids, second.id != "a") == ((), True)
    assert replay.take(Update("a", prompt_logprobs=(None,))).prompt_logprobs is None  # the client has it
    again = replay.take(Update(second.id, token_ids=(7,), prompt_logprobs=(score, score)))
    assert (again.id, again.prompt_logprobs, again.token_ids) == ("a", (score,), (7,))
    assert replay.begin().resumed_ids == (7,)
    assert replay.take(Update("a", prompt_logprobs=(None, score, score))).prompt_logprobs is None
    assert replay.take(Update("a", token_ids=(8, 9), finish_reason="stop")).token_ids == (8, 9)
