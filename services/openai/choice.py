"""One choice of a completion: its request to the engine, and the pieces that come of it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from uuid import uuid4

from attention.requests import GenerateRequest, SamplingParams, TokenLogprob
from services.backend import Backend, GenerationFailed
from services.openai.echo import Echo
from services.openai.params import choice_seed
from services.openai.schema import Sampling
from services.openai.text import Piece, ShownToken, TextStream


@dataclass(frozen=True, slots=True)
class ChoicePiece:
    """What one step brought one choice. Counts are totals so far."""

    index: int
    text: str
    tokens: tuple[ShownToken, ...]
    finish_reason: str | None
    completion_tokens: int
    cached_tokens: int
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The choices of one HTTP request: `choices_per_prompt` answers to each prompt."""

    prompts: tuple[tuple[int, ...], ...]
    params: tuple[SamplingParams, ...]  # of each prompt
    choices_per_prompt: int
    body: Sampling
    echoes: tuple[Echo, ...] = ()  # of each prompt, where they are given back

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.choices_per_prompt

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def request(self, index: int) -> GenerateRequest:
        prompt, choice = divmod(index, self.choices_per_prompt)
        seed = choice_seed(self.body.seed, choice)
        return GenerateRequest(uuid4().hex, self.prompts[prompt], replace(self.params[prompt], seed=seed))


async def run_choice(backend: Backend, plan: Plan, index: int) -> AsyncGenerator[ChoicePiece, None]:
    """Pieces of one choice until one has a finish_reason. Raises what the backend raises."""
    body = plan.body
    stream = TextStream(
        backend.model.tokenizer,
        body.stops,
        body.skip_special_tokens,
        body.include_stop_str_in_output,
        body.min_tokens or 0,
    )
    generated = cached = 0
    async with aclosing(backend.generate(plan.request(index))) as updates:
        async for update in updates:
            if update.finish_reason == "error":
                raise GenerationFailed(update.error or "generation failed")
            cached = max(cached, update.cached_tokens)
            pieces: list[Piece] = []
            for position, token in enumerate(update.token_ids):
                generated += 1
                ends = update.finish_reason == "stop" and position == len(update.token_ids) - 1
                pieces.append(stream.push(token, update.logprobs[position] if update.logprobs else None, ends))
                if pieces[-1].stopped:
                    break
            stopped = bool(pieces) and pieces[-1].stopped
            reason = "stop" if stopped else update.finish_reason
            if reason is not None and not stopped:
                pieces.append(stream.finish())
                if pieces[-1].stopped:
                    reason = "stop"
            text = "".join(piece.text for piece in pieces)
            tokens = tuple(token for piece in pieces for token in piece.tokens)
            if text or tokens or reason or update.prompt_logprobs:
                yield ChoicePiece(index, text, tokens, reason, generated, cached, update.prompt_logprobs)
            if reason is not None:
                return
    raise GenerationFailed("the answer ended without a reason")


async def run_choices(backend: Backend, plan: Plan) -> AsyncGenerator[ChoicePiece, None]:
    """Pieces of all choices as they come. Leaving early cancels every one of them; so does the first failure."""
    if plan.choices == 1:
        async with aclosing(run_choice(backend, plan, 0)) as pieces:
            async for piece in pieces:
                yield piece
        return
    ready: asyncio.Queue[ChoicePiece | Exception | None] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async with aclosing(run_choice(backend, plan, index)) as pieces:
                async for piece in pieces:
                    ready.put_nowait(piece)
            ready.put_nowait(None)
        except Exception as error:  # noqa: BLE001  handed to the consumer, which raises it
            ready.put_nowait(error)

    tasks = [asyncio.create_task(pump(index)) for index in range(plan.choices)]
    try:
        running = len(tasks)
        while running:
            item = await ready.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(backend: Backend, plan: Plan) -> list[list[ChoicePiece]]:
    """All pieces of every choice, by index."""
    gathered: list[list[ChoicePiece]] = [[] for _ in range(plan.choices)]
    async with aclosing(run_choices(backend, plan)) as pieces:
        async for piece in pieces:
            gathered[piece.index].append(piece)
    return gathered


def unused(plan: Plan) -> dict[str, object]:
    """What each chunk of a stream has in the place of its usage, where the last one tells it."""
    return {"usage": None} if plan.body.include_usage else {}


def usage(plan: Plan, completion_tokens: Sequence[int], cached_tokens: Sequence[int]) -> dict[str, object]:
    """OpenAI's usage object."""
    completion = sum(completion_tokens)
    return {
        "prompt_tokens": plan.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": plan.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": sum(cached_tokens[:: plan.choices_per_prompt])},
    }
