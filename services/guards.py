"""What a request meets before any route: the keys that open a path, and the caps on bodies.

Plain ASGI: a middleware that is a function of request and response would pass every event of a stream through two
tasks more.
"""

import contextlib
import hmac
import re
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.metrics import METRICS_PATH
from services.openai.errors import ApiError, error_response

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_COMMAS = (1 << 21) + (1 << 16)  # 64 prompts of 32 K token ids, and what is sent with them
MAX_SIGNS = 1 << 17  # 4096 messages of one part each have a third
LONG_NUMBER = 256  # digits; to read a longer one takes time by their square
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)  # of JSON
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


class JsonCount:
    """Counts what a JSON text is made of, outside of its strings, as the text comes.

    The event loop waits while JSON is read, longer for many values than for long ones. `commas` stand between values;
    `signs` are brackets, colons, points, the letters of words, and most of the digits of long numbers.
    """

    def __init__(self) -> None:
        self.commas = 0
        self.signs = 0
        self._before = b""  # what the next part goes on with: a string, and perhaps an escape in it

    def add(self, part: bytes) -> None:
        text = self._before + part
        cut = (len(text) - len(text.rstrip(b"\\"))) % 2  # an escape whose character is still to come
        plain = STRING.sub(b"", text[: len(text) - cut] + b'"')  # which ends a string, or begins one and stays
        within = not plain.endswith(b'"')
        self._before = b'"' * within + b"\\" * cut
        blocks = (plain[at : at + LONG_NUMBER] for at in range(0, len(plain) - LONG_NUMBER, LONG_NUMBER))
        self.commas += plain.count(b",")
        self.signs += len(plain.translate(None, b"0123456789,- \t\r\n")) - (not within)
        self.signs += LONG_NUMBER * sum(block.isdigit() for block in blocks)


class BodyCap:
    """Refuses a body over the caps while it is read, whatever its Content-Length said."""

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int = MAX_BODY_BYTES,
        max_commas: int = MAX_COMMAS,
        max_signs: int = MAX_SIGNS,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_commas = max_commas
        self._max_signs = max_signs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0
        made_of = JsonCount()
        refusal: ApiError | None = None

        async def counted() -> Message:
            nonlocal seen, refusal
            message = await receive()
            body = message.get("body", b"")
            seen += len(body)
            if len(body) < seen or message.get("more_body", False) or seen > self._max_signs:
                made_of.add(body)
            refusal = refusal or self._refusal(seen, made_of)
            if refusal is not None:
                raise refusal
            return message

        async def unless_refused(message: Message) -> None:
            if refusal is None:  # else the application answers that it could not read the body
                await send(message)

        with contextlib.suppress(ApiError):
            await self._app(scope, counted, unless_refused)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)

    def _refusal(self, seen: int, made_of: JsonCount) -> ApiError | None:
        if seen > self._max_bytes:
            fault = f"is over {self._max_bytes} bytes"
        elif made_of.commas > self._max_commas:
            fault = f"has over {self._max_commas} commas outside its strings"
        elif made_of.signs > self._max_signs:
            named = "brackets, colons, points, letters and digits of long numbers"
            fault = f"has over {self._max_signs} {named} outside its strings"
        else:
            return None
        return ApiError(f"the body {fault}; send less at once", 413, code="body_too_large")


def _route_path(scope: Mapping[str, object]) -> str:
    """The path that routes are matched with: without the prefix under which the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
