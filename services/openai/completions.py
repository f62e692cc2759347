"""POST /v1/completions, with echo and log-probabilities of the prompt."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

from attention.requests import TokenLogprob
from model.tokenizer import Tokenizer
from services.backend import Backend
from services.openai.choice import ChoicePiece, Plan, collect, run_choices, unused, usage
from services.openai.echo import Echo, echo_text, echo_tokens
from services.openai.params import (
    COMPLETION_MAX_TOKENS,
    check_choices,
    check_model,
    check_prompt,
    given_prompts,
    prompt_tokens,
    sampling_params,
)
from services.openai.schema import CompletionRequest
from services.openai.sse import Event, event_of
from services.openai.text import ShownToken


def plan_completion(request: CompletionRequest, backend: Backend) -> Plan:
    """Check everything that can be checked before a token is computed; raises ApiError."""
    model = backend.model
    check_model(request.model, model)
    given = given_prompts(request)
    check_choices(len(given) * (request.n or 1), backend.most_in_flight)
    prompts = [prompt_tokens(one, request, model) for one in given]
    budgets = [check_prompt(prompt, model, request.max_tokens, COMPLETION_MAX_TOKENS) for prompt in prompts]
    scored = request.logprobs if request.echo else None
    params = [sampling_params(request, model, budget, request.logprobs, scored) for budget in budgets]
    echoes = tuple(_unscored(one, request, model.tokenizer) for one in given) if request.echo else ()
    return Plan(tuple(map(tuple, prompts)), tuple(params), request.n or 1, request, echoes)


async def complete(plan: Plan, request: CompletionRequest, backend: Backend) -> dict[str, Any]:
    """All choices of all prompts at once."""
    choices = await collect(backend, plan)
    return await asyncio.to_thread(_whole, plan, request, backend, choices)  # thousands of tokens take a while


def _whole(
    plan: Plan, request: CompletionRequest, backend: Backend, choices: list[list[ChoicePiece]]
) -> dict[str, Any]:
    bodies = []
    for index, pieces in enumerate(choices):
        echo = _echo(plan, index, pieces) if request.echo else Echo()
        tokens = [token for piece in pieces for token in piece.tokens]
        bodies.append(
            {
                "index": index,
                "text": echo.text + "".join(piece.text for piece in pieces),
                "logprobs": _logprobs(echo, tokens, backend.model.tokenizer, request.logprobs),
                "finish_reason": pieces[-1].finish_reason,
            }
        )
    generated = [pieces[-1].completion_tokens for pieces in choices]
    cached = [pieces[-1].cached_tokens for pieces in choices]
    return _head(backend) | {"choices": bodies, "usage": usage(plan, generated, cached)}


async def stream_completion(plan: Plan, request: CompletionRequest, backend: Backend) -> AsyncGenerator[Event, None]:
    """Chunks as they come; with echo, a choice's first chunk is its prompt."""
    head = _head(backend) | unused(plan)
    tokenizer = backend.model.tokenizer
    generated, cached = [0] * plan.choices, [0] * plan.choices
    scores: list[list[ChoicePiece]] = [[] for _ in range(plan.choices)]
    prompts: dict[int, Echo] = {}

    def chunk(piece: ChoicePiece) -> dict[str, Any]:
        shift = len(prompts[piece.index].text) if piece.index in prompts else 0
        logprobs = _logprobs(Echo(), piece.tokens, tokenizer, request.logprobs, shift)
        return head | {"choices": [_choice(piece.index, piece.text, logprobs, piece.finish_reason)]}

    def echoed(index: int) -> dict[str, Any]:
        logprobs = _logprobs(prompts[index], (), tokenizer, request.logprobs)
        return head | {"choices": [_choice(index, prompts[index].text, logprobs, None)]}

    async with aclosing(run_choices(backend, plan)) as pieces:
        async for piece in pieces:
            index = piece.index
            generated[index], cached[index] = piece.completion_tokens, piece.cached_tokens
            if request.echo and index not in prompts:
                scores[index].append(piece)
            if not (piece.text or piece.tokens or piece.finish_reason):
                continue
            if request.echo and index not in prompts:
                prompts[index] = _echo(plan, index, scores[index])
                yield await event_of(len(prompts[index].tokens), partial(echoed, index))
            yield await event_of(len(piece.tokens), partial(chunk, piece))
    if plan.body.include_usage:
        yield head | {"choices": [], "usage": usage(plan, generated, cached)}


def _unscored(given: str | list[int], request: CompletionRequest, tokenizer: Tokenizer) -> Echo:
    if isinstance(given, str):
        return echo_text(given, tokenizer, request.add_special_tokens)
    return echo_tokens(given, tokenizer, request.skip_special_tokens)


def _echo(plan: Plan, index: int, pieces: Sequence[ChoicePiece]) -> Echo:
    scores = tuple(score for piece in pieces for score in piece.prompt_logprobs or ())
    return replace(plan.echoes[index // plan.choices_per_prompt], scores=scores)


def _logprobs(
    echo: Echo, tokens: Sequence[ShownToken], tokenizer: Tokenizer, wanted: int | None, shift: int = 0
) -> dict[str, Any] | None:
    """As they are answered, the lists of them as iterators."""
    if wanted is None:
        return None
    shift = shift or len(echo.text)
    entries: list[tuple[int, int, TokenLogprob | None]] = [
        *zip(echo.tokens, echo.offsets, echo.scores, strict=True),
        *((token.token_id, token.offset + shift, token.logprob) for token in tokens),
    ]
    return {
        "tokens": (tokenizer.token_text(token) for token, _, _ in entries),
        "token_logprobs": (None if score is None else score.logprob for _, _, score in entries),
        "top_logprobs": (None if score is None else _top(score, tokenizer) for _, _, score in entries),
        "text_offset": (offset for _, offset, _ in entries),
    }


def _top(score: TokenLogprob, tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest tokens by text; of two that read alike, the likelier."""
    top: dict[str, float] = {}
    for token, value in (*score.top, (score.token_id, score.logprob)):
        top.setdefault(tokenizer.token_text(token), value)
    return top


def _head(backend: Backend) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": backend.model.id,
        "system_fingerprint": backend.model.fingerprint,
    }


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
