"""What a request meets before any route: the keys that open a path, and the cap on bodies.

Plain ASGI: a middleware that is a function of request and response would pass every event of a stream through two
tasks more.
"""

import contextlib
import hmac
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.metrics import METRICS_PATH
from services.openai.errors import ApiError, error_response

MAX_BODY_BYTES = 16 * 1024 * 1024
OPEN_PATHS = ("/health",)
ADMIN_PREFIX = "/admin/"


class KeyGuard:
    """Without `api_key` the OpenAI routes are open; without `admin_token` the admin routes are closed."""

    def __init__(self, app: ASGIApp, api_key: str | None, admin_token: str | None) -> None:
        self._app = app
        self._api_key = api_key
        self._admin_token = admin_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = _route_path(scope)
        keys = self._keys(path)
        if path.startswith(ADMIN_PREFIX) and not keys:
            return ApiError("admin routes are closed: no admin token is set", 403)
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if keys and not (
            scheme.lower() == "bearer" and any(hmac.compare_digest(given.encode(), key.encode()) for key in keys)
        ):
            return ApiError("send 'Authorization: Bearer KEY' with this service's key", 401, code="invalid_api_key")
        return None

    def _keys(self, path: str) -> tuple[str, ...]:
        """Secrets that open a path, each alone; none for a path that is open."""
        if path.startswith(ADMIN_PREFIX):
            return (self._admin_token,) if self._admin_token is not None else ()
        if path in OPEN_PATHS or self._api_key is None:
            return ()
        if path == METRICS_PATH and self._admin_token is not None:
            return (self._api_key, self._admin_token)
        return (self._api_key,)


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


def _route_path(scope: Mapping[str, object]) -> str:
    """The path that routes are matched with: without the prefix under which the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
