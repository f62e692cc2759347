"""What /openapi.json says of a route's answers beside its own: refusals in the one shape, and streams."""

from typing import Any

from pydantic import BaseModel

Responses = dict[int | str, dict[str, Any]]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error: what was given, what was expected, and what to do."""

    error: ErrorDetail


REASONS = {
    400: "The request asks for what cannot be had; `param` names the field at fault",
    401: "The service has a key, and the request does not carry it",
    403: "Admin routes are closed: the service has no admin token",
    404: "No such model, or no such thing",
    409: "A change is under way, or, with the code `not_ready`, the service is not ready",
    413: "The body is too large",
    415: "The body does not say that it is JSON",
    429: "No room for another request; come again after `Retry-After` seconds",
    503: "It cannot be done now; come again after `Retry-After` seconds",
}


def refusals(*statuses: int) -> Responses:
    """The errors that a route answers with. Any other, 405 or 500, has their shape, and no route has FastAPI's 422."""
    described: Responses = {
        status: {"model": ErrorAnswer, "description": REASONS[status]} for status in sorted(statuses)
    }
    return described | {"default": {"model": ErrorAnswer, "description": "Any other error"}}


BODY = (400, 413, 415)  # where there is one
STREAM: Responses = {
    200: {
        "description": "The answer; with `stream`, in events as it comes, the last of which is [DONE]",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
TEXT: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
