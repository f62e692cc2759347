"""The HTTP application: every route, the key that guards them, and the cap on bodies. Knows nothing of Ray."""

import contextlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.admin import add_admin_routes
from services.backend import Backend
from services.metrics import METRICS_PATH, add_metrics_route
from services.openai import errors
from services.openai.chat import complete_chat, plan_chat, stream_chat
from services.openai.completions import complete, plan_completion, stream_completion
from services.openai.errors import ApiError, error_response
from services.openai.params import chat_prompt, check_model, check_token_ids
from services.openai.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from services.openai.sse import ClientGone, stream, unless_gone

MAX_BODY_BYTES = 16 * 1024 * 1024
OPEN_PATHS = ("/health",)
ADMIN_PREFIX = "/admin/"


class BodyCap:
    """Refuses a body over the cap while it is read, whatever its Content-Length said."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0
        too_large = ApiError(f"the body is over {self._max_bytes} bytes; send less at once", 413, code="body_too_large")

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise too_large
            return message

        async def unless_too_large(message: Message) -> None:
            if seen <= self._max_bytes:  # else the application answers that it could not read the body
                await send(message)

        with contextlib.suppress(ApiError):
            await self._app(scope, counted, unless_too_large)
        if seen > self._max_bytes:
            await error_response(too_large)(scope, receive, send)


def create_app(backend: Backend, api_key: str | None = None, admin_token: str | None = None) -> FastAPI:
    """All routes over one backend. Without `api_key` the OpenAI routes are open; without `admin_token` the
    admin routes are closed."""
    app = FastAPI(title="Shoal", description="OpenAI-compatible serving of DeepSeek-V2-family models.")
    errors.install(app)

    def keys(path: str) -> tuple[str, ...]:
        """Secrets that open a path, each alone; none for a path that is open."""
        if path.startswith(ADMIN_PREFIX):
            return (admin_token,) if admin_token is not None else ()
        if path in OPEN_PATHS or api_key is None:
            return ()
        return (api_key, admin_token) if path == METRICS_PATH and admin_token is not None else (api_key,)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        path = _route_path(request)
        secrets = keys(path)
        if path.startswith(ADMIN_PREFIX) and not secrets:
            return error_response(ApiError("admin routes are closed: no admin token is set", 403))
        if secrets and not any(_authorised(request, secret) for secret in secrets):
            return error_response(
                ApiError("send 'Authorization: Bearer KEY' with this service's key", 401, code="invalid_api_key")
            )
        return await call_next(request)

    app.add_middleware(BodyCap)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        plan = plan_chat(body, backend)
        if body.stream:
            return await stream(stream_chat(plan, backend))
        return JSONResponse(await unless_gone(request, complete_chat(plan, backend)))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        plan = plan_completion(body, backend)
        if body.stream:
            return await stream(stream_completion(plan, body, backend))
        return JSONResponse(await unless_gone(request, complete(plan, body, backend)))

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    _add_small_routes(app, backend)
    add_admin_routes(app, backend)
    add_metrics_route(app, backend)
    return app


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

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        check_model(model_id, backend.model)
        return card()

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        check_model(body.model, backend.model)
        tokenizer = backend.model.tokenizer
        if body.messages is not None:
            tokens = chat_prompt(body.messages, backend.model, body.add_generation_prompt)
        else:
            tokens = tokenizer.encode(body.prompt or "", body.add_special_tokens)
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": backend.model.max_length,
            "tokens": tokens,
        }
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer.token_text(token) for token in tokens]
        return answer

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        check_model(body.model, backend.model)
        check_token_ids(body.tokens, backend.model, "tokens")
        return {"prompt": backend.model.tokenizer.decode(body.tokens, skip_special_tokens=False)}

    @app.get("/health")
    async def health() -> Response:
        reason = await backend.unhealthy()
        if reason is None:
            return JSONResponse({"status": "ok"})
        return error_response(ApiError(reason, 503, code="not_ready", retry_after_s=1))

    @app.get("/admin/status")
    async def status() -> dict[str, Any]:
        return await backend.status()


def _route_path(request: Request) -> str:
    """The path that routes are matched with: without the prefix under which the application is mounted."""
    path, root = str(request.scope["path"]), str(request.scope.get("root_path", "")).rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _authorised(request: Request, secret: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), secret.encode())
