"""A backend that follows a script, and the HTTP application over it, called without a network."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import openai
from fastapi import FastAPI

from attention.requests import GenerateRequest, TokenLogprob, Update
from model.generation import GenerationDefaults
from model.tokenizer import Tokenizer
from services.api import create_app
from services.backend import GenerationFailed, Overloaded, ServedModel

MAX_LENGTH = 200
MODEL = "scripted"


class Script:
    """Answers every request with `answer`, the n-th choice rotated by n. Records what it was asked."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, answer: Sequence[int]) -> None:
        self._model = ServedModel(MODEL, 1, vocab_size, MAX_LENGTH, "fp", tokenizer, GenerationDefaults(0.7, 0.9))
        self.answer = list(answer)
        self.asked: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.room: int | None = None  # requests before Overloaded
        self.fail_after: int | None = None  # tokens before GenerationFailed
        self.pause_s = 0.0
        self.sick: str | None = None
        self.cached = 0

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
                last = count == params.max_tokens or count == len(self.answer)
                done = last
                yield Update(
                    request.id,
                    (token,),
                    None if params.logprobs is None else (score(token, params.logprobs),),
                    finish_reason=None if not last else "length" if count == params.max_tokens else "stop",
                    cached_tokens=self.cached,
                )
        finally:
            if not done:
                self.cancelled.append(request.id)

    async def unhealthy(self) -> str | None:
        return self.sick

    async def status(self) -> dict[str, Any]:
        return {"epoch": 4}


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
