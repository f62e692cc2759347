"""A backend that follows a script, and the HTTP application over it, called without a network."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import openai
from fastapi import FastAPI

from attention.requests import GenerateRequest, TokenLogprob, Update
from cluster.change import Wish
from model.generation import GenerationDefaults
from model.tokenizer import Tokenizer
from services.api import create_app
from services.backend import GenerationFailed, Overloaded, Reading, ServedModel

MAX_LENGTH = 200
MODEL = "scripted"


class Script:
    """Answers every request with `answer`, the n-th choice rotated by n. Records what it was asked."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, answer: Sequence[int]) -> None:
        self._model = ServedModel(MODEL, 1, vocab_size, MAX_LENGTH, "fp", tokenizer, GenerationDefaults(0.7, 0.9))
        self.answer = list(answer)
        self.end: tuple[int, ...] = ()  # the token by which it stops, if any
        self.asked: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.room: int | None = None  # requests before Overloaded
        self.most_in_flight = 256
        self.fail_after: int | None = None  # tokens before GenerationFailed
        self.pause_s = 0.0
        self.sick: str | None = None
        self.cached = 0
        self.report: dict[str, Any] = {"epoch": 4}  # of the controller
        self.away = False  # the controller
        self.wishes: list[Wish] = []
        self.rooms: list[tuple[int | None, str | None]] = []  # that were asked for
        self.room_answers: list[dict[str, Any]] = [{"done": True, "change": None}]  # the last stays
        self.refusal: Exception | None = None  # of every wish
        self.watched: list[tuple[str, int, float]] = []
        # What a change shows, first to whoever begins it, then to whoever watches; the last stays. None: not known
        self.story: list[dict[str, Any] | Exception | None] = [change_document()]
        self.log: list[dict[str, Any]] = []
        self.replays = 0

    @property
    def model(self) -> ServedModel:
        return self._model

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
        if self.room is not None and len(self.asked) >= self.room:
            raise Overloaded(retry_after_s=3)
        self.asked.append(request)
        done = False
        try:
            params = request.params
            if params.prompt_logprobs is not None:
                scores = [None, *(score(token, params.prompt_logprobs) for token in request.prompt_ids[1:])]
                last = params.max_tokens == 0
                yield Update(request.id, prompt_logprobs=tuple(scores), finish_reason="length" if last else None)
                done = last
            for count, token in enumerate(self.answer[: params.max_tokens], start=1):
                if self.fail_after is not None and count > self.fail_after:
                    raise GenerationFailed("the worker is gone")
                await asyncio.sleep(self.pause_s)
                done = count == params.max_tokens
                yield Update(
                    request.id,
                    (token,),
                    None if params.logprobs is None else (score(token, params.logprobs),),
                    finish_reason="length" if done else None,
                    cached_tokens=self.cached,
                )
            if not done:
                ended = None if params.logprobs is None else tuple(score(one, params.logprobs) for one in self.end)
                done = True
                yield Update(request.id, self.end, ended, finish_reason="stop", cached_tokens=self.cached)
        finally:
            if not done:
                self.cancelled.append(request.id)

    async def unhealthy(self) -> str | None:
        return self.sick

    async def status(self) -> dict[str, Any]:
        if self.away:
            raise GenerationFailed("the controller is being restarted; ask again")
        return self.report

    async def begin_change(self, wish: Wish) -> dict[str, Any]:
        self.wishes.append(wish)
        if self.refusal is not None:
            raise self.refusal
        begun = self._next()
        assert begun is not None
        return begun

    async def make_room(self, hosts: int | None, node: str | None) -> dict[str, Any]:
        self.rooms.append((hosts, node))
        if self.refusal is not None:
            raise self.refusal
        return self.room_answers.pop(0) if len(self.room_answers) > 1 else self.room_answers[0]

    async def watch_change(self, change_id: str, seen: int, timeout_s: float) -> dict[str, Any] | None:
        self.watched.append((change_id, seen, timeout_s))
        return self._next()

    async def events(self, after: int, limit: int) -> list[dict[str, Any]]:
        if self.away:
            raise GenerationFailed("the controller is being restarted; ask again")
        return [event for event in self.log if event["number"] > after][:limit]

    async def metrics(self) -> Reading:
        return Reading(len(self.asked), self.replays, None if self.away else self.report)

    def _next(self) -> dict[str, Any] | None:
        told = self.story.pop(0) if len(self.story) > 1 else self.story[0]
        if isinstance(told, Exception):
            raise told
        return told


def change_document(version: int = 1, phase: str = "plan", **fields: Any) -> dict[str, Any]:
    """What the controller says of a change: one host joins, another leaves, and four copies are loaded."""
    return {
        "id": "change-3",
        "kind": "scale",
        "why": None,
        "phase": phase,
        "over": phase in ("done", "rolled_back"),
        "reason": None,
        "joining": ["host-2"],
        "leaving": ["host-0"],
        "replicas": 1,
        "extra": 0,
        "pairs": 4,
        "pairs_loaded": 0,
        "epoch": None,
        "seconds": {},
        "version": version,
    } | fields


def service_report(**fields: Any) -> dict[str, Any]:
    """The status of a service with one ready host, one dead one and one attention worker."""
    host = {"pid": 11, "node": "n1", "progress": [8, 8]}
    return {
        "epoch": 7,
        "model": "/m",
        "model_id": MODEL,
        "state": "degraded",
        "reason": None,
        "replicas": 2,
        "extra": 1,
        "members": ["host-0", "host-1"],
        "nodes": None,
        "expert_hosts": [
            {"id": "host-0", "state": "ready", "generation": 1, "experts": 8, "bytes": 640, "load_share": 0.75} | host,
            {"id": "host-1", "state": "dead", "generation": 5, "experts": 0, "bytes": 0, "load_share": None} | host,
        ],
        "attention_workers": [
            {
                "id": "attention-a",
                "running": 3,
                "waiting": 2,
                "blocks_owned": 5,
                "blocks_total": 20,
                "preemptions": 4,
                "steps": 100,
                "prompt_tokens": 300,
                "generated_tokens": 90,
                "reused_tokens": 32,
                "epoch": 7,
                "dispatches": 50,
                "rows_sent": 800,
                "bytes_sent": 4000,
                "bytes_received": 9000,
                "resends": 6,
                "hedges": 2,
                "rows_resent": 17,
                "ways": {"host-0": "shared", "host-1": "shared"},
            }
        ],
        "load": {"total": 1000.0, "imbalance": 1.5},
        "change": None,
        "changes": [change_document(9, "done", epoch=7, seconds={"plan": 1.0, "prepare": 2.5, "retire": 0.5})],
        "events_total": {"host_died": 4, "epoch": 7},
        "controller": {"pid": 10},
    } | fields


def score(token: int, alternatives: int) -> TokenLogprob:
    """A log-probability that can be recognised: minus a hundredth of the token's id."""
    return TokenLogprob(token, -token / 100, tuple((token + n, -n - 0.5) for n in range(alternatives)))


def call(app: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
    """One request to the application."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(send())


def post(app: FastAPI, path: str, body: dict[str, Any]) -> httpx.Response:
    content = json.dumps({"model": MODEL} | body)
    return call(app, "POST", path, content=content, headers={"content-type": "application/json"})


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}]} | fields


def openai_client(app: FastAPI) -> openai.AsyncOpenAI:
    """The real client, whose network is the application itself."""
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shoal")
    return openai.AsyncOpenAI(base_url="http://shoal/v1", api_key="none", http_client=http, max_retries=0)


def make_app(script: Script, **keys: str) -> FastAPI:
    return create_app(script, **keys)
