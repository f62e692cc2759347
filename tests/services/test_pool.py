"""A lost worker costs a replay; a request with which engine after engine fails is given up."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from attention.requests import GenerateRequest, SamplingParams, Update
from attention.service_client import WorkerLost
from services.backend import GenerationFailed
from services.pool import MAX_FAILURES, MAX_SILENT, WorkerPool

REQUEST = GenerateRequest("a", (1, 2), SamplingParams(max_tokens=3))
END = Update("a", finish_reason="length")
Life = tuple[tuple[Update, ...], WorkerLost | None]


class Workers:
    """Chosen one after another; each gives its updates, and is lost then or not."""

    def __init__(self, *lives: Life) -> None:
        self._lives = iter(lives)
        self.asked: list[GenerateRequest] = []

    async def choose(self, request: GenerateRequest) -> "Workers":
        return self

    @property
    def address(self) -> str:
        return f"worker-{len(self.asked)}"

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
        self.asked.append(request)
        updates, lost = next(self._lives)
        for update in updates:
            yield update
        if lost is not None:
            raise lost


def answer(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Update], WorkerPool]:
    pool = object.__new__(WorkerPool)  # without the tasks that follow a controller
    pool.replays, pool._token_s = 0, 0.0
    monkeypatch.setattr(pool, "_choose", workers.choose)

    async def collect() -> list[Update]:
        return [update async for update in pool._replayed(REQUEST)]

    return asyncio.run(collect()), pool


def test_broken_streams_are_replayed_however_often(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [((Update("a", token_ids=(number,)),), WorkerLost("gone")) for number in range(2 * MAX_FAILURES)]
    workers = Workers(*broken, ((END,), None))
    updates, pool = answer(workers, monkeypatch)
    assert [token for update in updates for token in update.token_ids] == list(range(2 * MAX_FAILURES))
    assert [len(request.resumed_ids) for request in workers.asked] == list(range(2 * MAX_FAILURES + 1))
    assert pool.replays == 2 * MAX_FAILURES


def test_engines_that_fail_are_not_tried_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(*[((), WorkerLost("no memory", failed=True))] * MAX_FAILURES)
    with pytest.raises(GenerationFailed, match="3 workers failed with this request: no memory"):
        answer(workers, monkeypatch)
    assert len(workers.asked) == MAX_FAILURES


def test_a_request_that_takes_every_worker_with_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = ((Update("a", prompt_logprobs=(None,)),), WorkerLost("gone"))  # which nobody gets a second time
    workers = Workers(*[taken] * (MAX_SILENT - 1), ((Update("a", token_ids=(1,)),), WorkerLost("gone")), *[taken] * 99)
    with pytest.raises(GenerationFailed, match="16 workers were lost before this request got anything: gone"):
        answer(workers, monkeypatch)
    assert len(workers.asked) == MAX_SILENT + MAX_SILENT - 1


def test_an_engine_that_fails_once_is_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(((), WorkerLost("no memory", failed=True)), ((END,), None))
    assert [update.finish_reason for update in answer(workers, monkeypatch)[0]] == ["length"]


@pytest.mark.parametrize(
    ("steps", "sick"),
    [([3, 9], False), ([3, 3], True), ([3, None], True), ([None, 9], True), ([3, 0], True)],
    ids=["busy", "stuck", "unknown later", "unknown before", "gone"],
)
def test_a_worker_that_makes_steps_is_not_sick_though_nobody_gets_a_token(
    monkeypatch: pytest.MonkeyPatch, steps: list[int | None], sick: bool
) -> None:
    monkeypatch.setattr("services.pool.PROBE_S", 0.02)
    counts = iter(steps)

    class Silent:
        alive = True

        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
            await asyncio.sleep(60)
            yield END

    async def choose(request: GenerateRequest) -> Silent:
        return Silent()

    async def status() -> dict[str, object]:
        count = next(counts)
        if count is None:
            raise GenerationFailed("the controller is being restarted; ask again")
        return {"attention_workers": [{"id": "a", "steps": count}] if count else []}

    async def ask() -> str | None:
        pool = object.__new__(WorkerPool)
        pool.replays, pool._token_s, pool._probing = 0, -1e9, asyncio.Lock()
        pool._clients = {"a": Silent()}  # type: ignore[dict-item]
        monkeypatch.setattr(pool, "_choose", choose)
        monkeypatch.setattr(pool, "status", status)
        return await pool.unhealthy()

    said = asyncio.run(ask())
    assert (said is not None) == sick
