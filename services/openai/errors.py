"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from services.backend import GenerationFailed, Overloaded
from services.openai.strict import UNSUPPORTED


class ApiError(Exception):
    """A request that is answered with an error; the message says what was given, expected, and what to do."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else None
    return JSONResponse(error_body(error.message, error.status, error.param, error.code), error.status, headers)


def as_api_error(error: Exception) -> ApiError:
    """The answer to anything that may come out of a backend."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(str(error), 429, code="overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, GenerationFailed):
        return ApiError(str(error), 503, code="generation_failed", retry_after_s=1)
    return ApiError(f"internal error: {type(error).__name__}", 500, code="internal_error")


def install(app: FastAPI) -> None:
    """Answer everything that goes wrong in the one shape."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message, code = error.detail if isinstance(error.detail, str) else str(error.detail), None
        if error.status_code == 404:
            message = f"{request.method} {request.url.path} does not exist; see /openapi.json for what does"
        elif error.status_code == 405:
            message = f"{request.url.path} does not answer {request.method}"
        elif error.__cause__ is not None:  # FastAPI's own, when the body's JSON cannot be read
            reason = str(error.__cause__)[:200]
            message, code = f"the body is not valid JSON: {reason}; send UTF-8, not compressed", "invalid_json"
        response = error_response(ApiError(message, error.status_code, code=code))
        response.headers.update(error.headers or {})
        return response

    for kind in (ApiError, Overloaded, GenerationFailed, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _from_validation(error: RequestValidationError) -> ApiError:
    first = _plainest(error.errors())
    param = ".".join(_path(first["loc"])) or None
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(f"the body is not valid JSON: {reason}", code="invalid_json")
    if isinstance(first.get("input"), bytes):  # that nothing said was JSON
        return ApiError(
            "send the body as JSON, with Content-Type: application/json", 415, code="unsupported_media_type"
        )
    if first["type"] == "extra_forbidden":
        param = ".".join([*_path(first["loc"][:-1]), str(first["loc"][-1])[:100]])  # its name may be anything
        return ApiError(f"unknown parameter {param!r}: remove it", param=param, code="unknown_parameter")
    if first["type"] == UNSUPPORTED:
        return ApiError(f"{param} {first['msg']}", param=param, code=UNSUPPORTED)
    message = first["msg"].removeprefix("Value error, ")
    given = _shown(first.get("input"))
    return ApiError(f"{param or 'body'}: {message}; given {given}", param=param, code="invalid_value")


def _shown(value: object) -> str:
    """The beginning of what was given, which may be millions of numbers long."""
    return repr(_beginning(value, 3))[:100]


def _beginning(value: object, depth: int) -> object:
    """A few of what a value holds, `depth` deep, which is all that a hundred characters can show."""
    if isinstance(value, str):
        return value[:100]
    if isinstance(value, list):
        return [_beginning(item, depth - 1) for item in value[:20]] if depth else []
    if isinstance(value, dict):
        return {key[:100]: _beginning(item, depth - 1) for key, item in islice(value.items(), 10)} if depth else {}
    return value


def _plainest(found: Sequence[Any]) -> Any:
    """The first error; of a value that may have several types, the one that says more than that it is not another.

    Of a message that uses what is not supported, that, and not what it may lack therefore.
    """
    field = _path(found[0]["loc"])[:1]
    same = [error for error in found if _path(error["loc"])[:1] == field]
    telling = [error for error in same if not error["type"].endswith("_type")]
    return next((error for error in telling if error["type"] == UNSUPPORTED), (telling or found)[0])


def _path(where: Sequence[str | int]) -> list[str]:
    """Names and indexes that lead to a value, without those of the types that were tried."""
    return [str(part) for part in where if part != "body" and (isinstance(part, int) or part.isidentifier())]
