"""The command's own calls to a running service's admin routes."""

from typing import Any

import httpx

from services.commands import CommandError, authorization
from services.state import ServiceRecord

ANSWER_S = 15.0


class NotFound(CommandError):
    """The service answers, and knows no such thing."""


class NotNow(CommandError):
    """The service refuses for now: another change is under way, or it is not ready."""


class NotReady(NotNow):
    """The service is not ready: it starts, or its controller was restarted."""


class NotAnswered(CommandError):
    """No usable answer came; asked again, the service may give one."""


class AdminClient:
    """Asks one service, with its own token; raises CommandError where none is known."""

    def __init__(self, record: ServiceRecord) -> None:
        if not record.admin_token:
            raise CommandError(f"set SHOAL_ADMIN_TOKEN to the admin token of {record.url}")
        self.record = record
        headers = authorization(record.admin_token, "the admin token")
        self._http = httpx.Client(base_url=record.url, headers=headers, trust_env=False)

    def get(self, path: str, query: dict[str, Any] | None = None, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Raises CommandError with the service's own words, as one of the classes above where it is that."""
        return self._ask("GET", path, timeout_s, params=query or {})

    def post(self, path: str, body: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Raises what `get` raises."""
        return self._ask("POST", path, timeout_s, json=body)

    def _ask(self, method: str, path: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        url = self.record.url
        try:
            answer = self._http.request(method, path, timeout=timeout_s, **arguments)
        except httpx.HTTPError as error:
            raise NotAnswered(f"{url} does not answer ({str(error) or type(error).__name__})") from error
        document = _document(answer)
        if answer.is_success and document is not None:
            return document
        refusal = _refusal(document)
        if refusal is None:  # not the application: a proxy that does not find it yet, or has lost it
            raise NotAnswered(f"{url} answered {answer.status_code} to {method} {path}; it may be restarting")
        message = str(refusal["message"])
        if answer.status_code >= 500:
            raise NotAnswered(message)
        if answer.status_code in (401, 403):
            raise CommandError(f"{url} does not take the admin token: set SHOAL_ADMIN_TOKEN to its own ({message})")
        if answer.status_code == 409:
            raise (NotReady if refusal.get("code") == "not_ready" else NotNow)(message)
        raise (NotFound if answer.status_code == 404 else CommandError)(message)


def _document(answer: httpx.Response) -> dict[str, Any] | None:
    try:
        document = answer.json()
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _refusal(document: dict[str, Any] | None) -> dict[str, Any] | None:
    """An error in the shape of this service's errors: its message, and its code."""
    error = (document or {}).get("error")
    return error if isinstance(error, dict) and "message" in error else None
