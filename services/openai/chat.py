"""POST /v1/chat/completions."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any
from uuid import uuid4

from model.tokenizer import Tokenizer
from services.backend import Backend
from services.openai.choice import ChoicePiece, Plan, collect, run_choices, unused, usage
from services.openai.params import (
    chat_max_tokens,
    chat_text,
    check_choices,
    check_model,
    check_prompt,
    encode_fitting,
    sampling_params,
)
from services.openai.schema import ChatRequest
from services.openai.sse import Event, event_of
from services.openai.text import ShownToken


def plan_chat(request: ChatRequest, backend: Backend) -> Plan:
    """Check everything that can be checked before a token is computed; raises ApiError."""
    model = backend.model
    check_model(request.model, model)
    check_choices(request.n or 1, backend.most_in_flight)
    text = chat_text(request.messages, model, request.add_generation_prompt)
    prompt = encode_fitting(text, model, add_special_tokens=False, param="messages")  # the template writes them
    given, field = chat_max_tokens(request)
    max_tokens = check_prompt(prompt, model, given, None, ("messages", field))
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = sampling_params(request, model, max_tokens, logprobs, None)
    return Plan((tuple(prompt),), (params,), request.n or 1, request)


async def complete_chat(plan: Plan, backend: Backend) -> dict[str, Any]:
    """The whole answer at once."""
    choices = await collect(backend, plan)
    return await asyncio.to_thread(_whole, plan, backend, choices)  # thousands of tokens take a while


def _whole(plan: Plan, backend: Backend, choices: list[list[ChoicePiece]]) -> dict[str, Any]:
    tokenizer = backend.model.tokenizer
    return _head("chat.completion", backend) | {
        "choices": [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": "".join(piece.text for piece in pieces),
                    "refusal": None,
                },
                "logprobs": _logprobs([t for piece in pieces for t in piece.tokens], tokenizer, plan),
                "finish_reason": pieces[-1].finish_reason,
            }
            for index, pieces in enumerate(choices)
        ],
        "usage": usage(
            plan,
            [pieces[-1].completion_tokens for pieces in choices],
            [pieces[-1].cached_tokens for pieces in choices],
        ),
    }


async def stream_chat(plan: Plan, backend: Backend) -> AsyncGenerator[Event, None]:
    """Chunks of the answer as they come; the first event waits for the first piece."""
    head = _head("chat.completion.chunk", backend) | unused(plan)
    tokenizer = backend.model.tokenizer
    generated, cached = [0] * plan.choices, [0] * plan.choices
    opened: set[int] = set()

    def content(piece: ChoicePiece) -> dict[str, Any]:
        logprobs = _logprobs(piece.tokens, tokenizer, plan)
        return head | {"choices": [_chunk(piece.index, {"content": piece.text}, logprobs)]}

    async with aclosing(run_choices(backend, plan)) as pieces:
        async for piece in pieces:
            generated[piece.index], cached[piece.index] = piece.completion_tokens, piece.cached_tokens
            if piece.index not in opened:
                opened.add(piece.index)
                yield head | {"choices": [_chunk(piece.index, {"role": "assistant", "content": ""})]}
            if piece.text or piece.tokens:
                yield await event_of(len(piece.tokens), partial(content, piece))
            if piece.finish_reason is not None:
                yield head | {"choices": [_chunk(piece.index, {}, None, piece.finish_reason)]}
    if plan.body.include_usage:
        yield head | {"choices": [], "usage": usage(plan, generated, cached)}


def _head(kind: str, backend: Backend) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": backend.model.id,
        "system_fingerprint": backend.model.fingerprint,
    }


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(tokens: Sequence[ShownToken], tokenizer: Tokenizer, plan: Plan) -> dict[str, Any] | None:
    """As they are answered, the list of them as an iterator."""
    if plan.params[0].logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": logprob,
            "bytes": list(tokenizer.token_bytes(token)),
        }

    return {
        "content": (
            entry(token.token_id, token.logprob.logprob)
            | {"top_logprobs": [entry(other, value) for other, value in token.logprob.top]}
            for token in tokens
            if token.logprob is not None
        ),
        "refusal": None,
    }
