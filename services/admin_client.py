"""The command's own calls to a running service's admin routes."""

from typing import Any

import httpx

from services.commands import CommandError
from services.state import ServiceRecord

ANSWER_S = 15.0


class NotFound(CommandError):
    """The service answers, and knows no such thing."""


class NotNow(CommandError):
    """The service refuses for now: it is not ready, or another change is under way."""


class NotAnswered(CommandError):
    """No usable answer came; asked again, the service may give one."""


class AdminClient:
    """Asks one service, with its own token; raises CommandError where none is known."""

    def __init__(self, record: ServiceRecord) -> None:
        if not record.admin_token:
            raise CommandError(f"set SHOAL_ADMIN_TOKEN to the admin token of {record.url}")
        self.record = record
        headers = {"Authorization": f"Bearer {record.admin_token}"}
        self._http = httpx.Client(base_url=record.url, headers=headers, trust_env=False)

    def get(self, path: str, query: dict[str, Any] | None = None, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Raises CommandError with the service's own words, as NotFound, NotNow or NotAnswered where it is that."""
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
        message = _message(document)
        if message is None:  # not the application: a proxy that does not find it yet, or has lost it
            raise NotAnswered(f"{url} answered {answer.status_code} to {method} {path}; it may be restarting")
        if answer.status_code >= 500:
            raise NotAnswered(message)
        if answer.status_code in (401, 403):
            raise CommandError(f"{url} does not take the admin token: set SHOAL_ADMIN_TOKEN to its own ({message})")
        raise {404: NotFound, 409: NotNow}.get(answer.status_code, CommandError)(message)


def _document(answer: httpx.Response) -> dict[str, Any] | None:
    try:
        document = answer.json()
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _message(document: dict[str, Any] | None) -> str | None:
    """What an error in the shape of this service's errors says."""
    error = (document or {}).get("error")
    return str(error["message"]) if isinstance(error, dict) and "message" in error else None
