"""The attention workers as one backend: chooses, replays on another when one is lost, and refuses overload."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict
from typing import Any

from ray.exceptions import RayError, RayTaskError

from attention.replay import Replay
from attention.requests import GenerateRequest, SamplingParams, Update
from attention.service_client import AttentionClient, WorkerLost
from cluster.change import ChangeRefused, Wish
from cluster.discovery import find_controller
from cluster.joining import OtherFiles
from cluster.spec import ServiceSpec
from services.backend import GenerationFailed, Overloaded, Reading, ServedModel

POLL_S = 10.0
RETRY_S = 0.2
MAX_FAILURES = 3  # engines that may fail with a request, before it is thought to be the cause
MAX_SILENT = 16  # workers that may go, one after another, before a request got anything; as many may go at once
FRESH_S = 5.0  # a token generated so recently shows that the service works
PROBE_S = 5.0
STEPS_S = 1.0  # for the controller to say how many
METRICS_S = 5.0  # for the controller to answer, before a scrape goes without it
PREFIX_TOKENS = 32  # prompts that agree on so many tokens prefer one worker, whose cache may hold them
PREFERENCE = 4  # requests that a preferred worker may have more than the least busy


class WorkerPool:
    """A Backend over the workers that the controller knows. Keeps each answer's tokens until it ends."""

    def __init__(
        self, model: ServedModel, service: ServiceSpec, contents: str, max_in_flight: int, worker_deadline_s: float
    ) -> None:
        """`contents` of the service's files, as `cluster.joining.contents_of` has it.

        A request waits for a worker to be there, or there again, for `worker_deadline_s` before it fails.
        """
        self._model = model
        self._service = service
        self._contents = contents
        self._namespace = service.namespace
        self._max_in_flight = max_in_flight
        self._worker_deadline_s = worker_deadline_s
        self._tls = service.tls
        self._in_flight = 0
        self.replays = 0  # answers that went on with another worker
        self._token_s = -FRESH_S  # when a token was last generated
        self._probing = asyncio.Lock()
        self._clients: dict[str, AttentionClient] = {}
        self._token: str | None = None
        self._refused: str | None = None  # why this ingress may not serve
        self._arrived = asyncio.Condition()
        self._addresses: frozenset[str] = frozenset()
        self._broken = asyncio.Event()
        self._connecting = asyncio.Lock()
        self._tasks = (asyncio.create_task(self._follow()), asyncio.create_task(self._mend()))

    @property
    def model(self) -> ServedModel:
        return self._model

    @property
    def most_in_flight(self) -> int:
        return self._max_in_flight

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
        """The worker's updates; when it is lost, the tokens sent so far are replayed on another one."""
        if self._in_flight >= self._max_in_flight:
            raise Overloaded(retry_after_s=1)
        self._in_flight += 1
        try:
            async with aclosing(self._replayed(request)) as updates:
                async for update in updates:
                    yield update
        finally:
            self._in_flight -= 1

    async def unhealthy(self) -> str | None:
        """None when a token was generated within FRESH_S, or steps are made, or a token can be now; else what is wrong.

        A prompt may take all of several steps, and what is asked beside it waits.
        """
        if not any(client.alive for client in self._clients.values()):
            return self._refused or "no attention worker is ready"
        async with self._probing:
            if time.monotonic() - self._token_s < FRESH_S:
                return None
            before = await self._steps()
            probe = GenerateRequest(f"health-{uuid.uuid4().hex}", (0,), SamplingParams(max_tokens=1, temperature=0.0))
            try:
                async with asyncio.timeout(PROBE_S), aclosing(self._replayed(probe)) as updates:
                    async for update in updates:
                        if update.finish_reason == "error":
                            return f"no token can be generated: {update.error}"
            except (TimeoutError, GenerationFailed):
                after = await self._steps()
                if not any(after.get(worker, 0) > steps for worker, steps in before.items()):
                    return f"no token was generated within {PROBE_S:.0f} s"
            return None

    async def _steps(self) -> dict[str, int]:
        """Steps by worker, as the controller knows them; none while it is away."""
        try:
            async with asyncio.timeout(STEPS_S):
                status = await self.status()
        except (TimeoutError, GenerationFailed):
            return {}
        return {worker["id"]: worker["steps"] for worker in status["attention_workers"]}

    async def _replayed(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
        replay, failures = Replay(request), 0
        silent: set[str] = set()
        while True:
            client = await self._choose(request)
            try:
                async with aclosing(client.generate(replay.begin())) as updates:
                    async for update in updates:
                        update = replay.take(update)
                        if update.token_ids or update.prompt_logprobs:  # not what an earlier worker gave already
                            silent.clear()
                        if update.token_ids:
                            self._token_s = time.monotonic()
                        yield update
                        if update.finish_reason is not None:
                            return
            except WorkerLost as lost:
                self.replays += 1
                failures += lost.failed
                if failures >= MAX_FAILURES:
                    raise GenerationFailed(f"{failures} workers failed with this request: {lost}") from lost
                silent.add(client.address)
                if len(silent) >= MAX_SILENT:
                    gone = f"{len(silent)} workers were lost before this request got anything"
                    raise GenerationFailed(f"{gone}: {lost}") from lost

    async def status(self) -> dict[str, Any]:
        try:
            status: dict[str, Any] = await find_controller(self._namespace).status.remote()
        except (ValueError, RayError):
            raise GenerationFailed("the controller is being restarted; ask again") from None
        return status | {"in_flight": self._in_flight, "model_id": self._model.id}

    async def _choose(self, request: GenerateRequest) -> AttentionClient:
        """The worker likely to hold the prompt's beginning, unless it is much busier than the least busy."""
        if self._refused is not None:
            raise GenerationFailed(self._refused)
        async with self._arrived:
            try:
                async with asyncio.timeout(self._worker_deadline_s):
                    await self._arrived.wait_for(lambda: any(c.alive for c in self._clients.values()))
            except TimeoutError:
                within = f"{self._worker_deadline_s:.0f} s"
                raise GenerationFailed(f"no attention worker was ready within {within}") from None
        alive = sorted((c for c in self._clients.values() if c.alive), key=lambda client: client.address)
        preferred = alive[hash(request.prompt_ids[:PREFIX_TOKENS]) % len(alive)]
        least = min(alive, key=lambda client: client.in_flight)
        return preferred if preferred.in_flight <= least.in_flight + PREFERENCE else least

    async def _follow(self) -> None:
        """Connect to workers that come, hang up on those that go."""
        version = -1
        while True:
            try:
                controller = find_controller(self._namespace)
                if self._token is None:
                    self._token = await controller.join.remote(self._service, self._contents, False)
                found = await controller.watch_workers.remote(self._token or "", version, POLL_S)
            except (ValueError, RayError) as error:
                self._refused = _refusal(error)
                version = -1
                await asyncio.sleep(RETRY_S)
                continue
            self._refused = None
            if found is None:  # another service has taken the name, or is about to make room for this one
                self._token, found = None, (-1, {})
                await asyncio.sleep(RETRY_S)
            version, workers = found
            self._addresses = frozenset(workers.values())
            await self._connect()

    async def _mend(self) -> None:
        """Connect anew to a worker whose stream broke, for as long as the controller names it."""
        while True:
            await self._broken.wait()
            await asyncio.sleep(RETRY_S)  # a worker that died is soon no longer named
            self._broken.clear()
            await self._connect()

    async def _connect(self) -> None:
        async with self._connecting:
            addresses, known = self._addresses, tuple(self._clients.items())
            for address in [address for address, client in known if address not in addresses or not client.alive]:
                await self._clients.pop(address).close()
            for address in addresses - self._clients.keys():
                self._clients[address] = AttentionClient(address, self._token, self._tls, self._broken.set)
        async with self._arrived:
            self._arrived.notify_all()

    async def begin_change(self, wish: Wish) -> dict[str, Any]:
        with _answering():
            asked = asdict(wish) | {"leaving": list(wish.leaving)}
            change: dict[str, Any] = await find_controller(self._namespace).begin_change.remote(asked)
        return change

    async def make_room(self, hosts: int | None, node: str | None) -> dict[str, Any]:
        with _answering():
            answer: dict[str, Any] = await find_controller(self._namespace).make_room.remote(hosts, node)
        return answer

    async def watch_change(self, change_id: str, seen: int, timeout_s: float) -> dict[str, Any] | None:
        with _answering():
            controller = find_controller(self._namespace)
            change: dict[str, Any] | None = await controller.watch_change.remote(change_id, seen, timeout_s)
        return change

    async def events(self, after: int, limit: int) -> list[dict[str, Any]]:
        with _answering():
            events: list[dict[str, Any]] = await find_controller(self._namespace).events.remote(after, limit)
        return events

    async def metrics(self) -> Reading:
        status = None
        with suppress(GenerationFailed, TimeoutError):
            async with asyncio.timeout(METRICS_S):
                status = await self.status()
        return Reading(self._in_flight, self.replays, status)


def _refusal(error: Exception) -> str | None:
    """What an ingress that reads other files than the service was told; None where the controller is only away."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return str(cause) if isinstance(cause, OtherFiles) else None


@contextmanager
def _answering() -> Iterator[None]:
    """Raises what the controller refused, and GenerationFailed while it is away."""
    try:
        yield
    except ChangeRefused as refused:
        # Ray raises a class derived from the refusal's own, whose text is the actor's whole traceback
        raise (refused.cause if isinstance(refused, RayTaskError) else refused) from None
    except (ValueError, RayError):
        raise GenerationFailed("the controller is being restarted; ask again") from None
