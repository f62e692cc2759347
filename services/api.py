"""The HTTP application: every route, and what guards them. Knows nothing of Ray."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from services.admin import add_admin_routes
from services.backend import Backend
from services.guards import BodyCap, KeyGuard
from services.metrics import add_metrics_route
from services.openai import errors
from services.openai.chat import complete_chat, plan_chat, stream_chat
from services.openai.completions import complete, plan_completion, stream_completion
from services.openai.errors import ApiError, error_response
from services.openai.large_json import LargeResponse
from services.openai.params import chat_text, check_model, check_token_ids
from services.openai.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from services.openai.sse import ClientGone, stream, unless_gone
from services.openapi import BODY, STREAM, refusals


def create_app(
    backend: Backend, api_key: str | None = None, admin_token: str | None = None, ingress: str = "ingress"
) -> FastAPI:
    """All routes over one backend; see `KeyGuard` for the keys. `ingress` is this one's name among several."""
    app = FastAPI(title="Shoal", description="OpenAI-compatible serving of DeepSeek-V2-family models.")
    errors.install(app)

    app.add_middleware(KeyGuard, api_key=api_key, admin_token=admin_token)
    app.add_middleware(BodyCap)

    generating = STREAM | refusals(*BODY, 401, 404, 429, 503)

    @app.post("/v1/chat/completions", responses=generating)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        plan = await asyncio.to_thread(plan_chat, body, backend)  # a long text takes a tokenizer seconds
        if body.stream:
            return await unless_gone(request, stream(stream_chat(plan, backend)))
        return await _written(await unless_gone(request, complete_chat(plan, backend)))

    @app.post("/v1/completions", responses=generating)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        plan = await asyncio.to_thread(plan_completion, body, backend)
        if body.stream:
            return await unless_gone(request, stream(stream_completion(plan, body, backend)))
        return await _written(await unless_gone(request, complete(plan, body, backend)))

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    _add_small_routes(app, backend)
    add_admin_routes(app, backend)
    add_metrics_route(app, backend, ingress)
    return app


async def _written(answer: dict[str, Any]) -> Response:
    return await asyncio.to_thread(LargeResponse, answer)


def _add_small_routes(app: FastAPI, backend: Backend) -> None:
    def card() -> dict[str, Any]:
        model = backend.model
        return {
            "id": model.id,
            "object": "model",
            "created": model.created,
            "owned_by": "shoal",
            "max_model_len": model.max_length,
        }

    @app.get("/v1/models", responses=refusals(401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model_id:path}", responses=refusals(401, 404))
    async def model(model_id: str) -> dict[str, Any]:
        check_model(model_id, backend.model)
        return card()

    @app.post("/tokenize", response_model=dict[str, Any], responses=refusals(*BODY, 401, 404))
    def tokenize(body: TokenizeRequest) -> Response:
        check_model(body.model, backend.model)
        tokenizer = backend.model.tokenizer
        if body.messages is not None:
            text, special = chat_text(body.messages, backend.model, body.add_generation_prompt), False
        else:
            text, special = body.prompt or "", True
        special = special if body.add_special_tokens is None else body.add_special_tokens
        tokens = tokenizer.encode(text, special)
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": backend.model.max_length,
            "tokens": tokens,
        }
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer.token_text(token) for token in tokens]
        return LargeResponse(answer)

    @app.post("/detokenize", responses=refusals(*BODY, 401, 404))
    def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        check_model(body.model, backend.model)
        check_token_ids(body.tokens, backend.model, "tokens")
        return {"prompt": backend.model.tokenizer.decode(body.tokens, skip_special_tokens=False)}

    @app.get("/health", responses=refusals(503))
    async def health() -> Response:
        reason = await backend.unhealthy()
        if reason is None:
            return JSONResponse({"status": "ok"})
        return error_response(ApiError(reason, 503, code="not_ready", retry_after_s=1))

    @app.get("/admin/status", responses=refusals(401, 403, 503))
    async def status() -> dict[str, Any]:
        return await backend.status()
