"""/openapi.json tells of the answers that there really are."""

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cluster.change import ChangeRefused
from services.backend import GenerationFailed
from tests.services.script import MODEL, Script, call, chat_body, make_app, service_report

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SHAPE = {"$ref": "#/components/schemas/ErrorAnswer"}
ADMIN = {"Authorization": "Bearer the-admin-token"}
JSON = {"content-type": "application/json"}


@pytest.fixture
def document(app: FastAPI) -> dict[str, Any]:
    told: dict[str, Any] = call(app, "GET", "/openapi.json").json()
    return told


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def send(app: FastAPI, path: str, body: dict[str, Any], headers: dict[str, str] = JSON) -> httpx.Response:
    return call(app, "POST", path, content=json.dumps(body), headers=headers)


def test_every_error_has_the_shape_that_is_answered(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        errors = {status: answer for status, answer in operation["responses"].items() if not status.startswith("2")}
        assert "default" in errors, name
        assert all(answer["content"] == {"application/json": {"schema": SHAPE}} for answer in errors.values()), name
    error = document["components"]["schemas"]["ErrorDetail"]
    assert error["required"] == ["message", "type", "param", "code"]


def test_fastapis_own_errors_are_not_told_of(document: dict[str, Any]) -> None:
    assert all("422" not in operation["responses"] for operation in operations(document).values())
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


def test_answers_that_may_come_in_events_say_so(document: dict[str, Any]) -> None:
    streaming = {
        name
        for name, operation in operations(document).items()
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", {})
    }
    assert streaming == {f"POST {CHAT}", f"POST {TEXT}"}
    for name in streaming:
        assert set(operations(document)[name]["responses"]["200"]["content"]) == {
            "application/json",
            "text/event-stream",
        }


def test_metrics_are_text(document: dict[str, Any]) -> None:
    assert set(operations(document)["GET /metrics"]["responses"]["200"]["content"]) == {"text/plain"}


def test_what_is_answered_is_what_is_told(document: dict[str, Any], script: Script) -> None:
    """Every refusal that can be brought about; with those that came, none is left out and none invented."""
    script.report = service_report()
    open_, keyed = make_app(script), make_app(script, api_key="the-right-key", admin_token="the-admin-token")
    seen: dict[str, set[str]] = {name: {"default"} for name in operations(document)}

    def note(name: str, answer: httpx.Response, status: int) -> None:
        assert answer.status_code == status, (name, answer.text)
        seen[name].add(str(status))

    bodies = {CHAT: chat_body(), TEXT: {"prompt": "a"}, "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [5]}}
    for path, body in bodies.items():
        name = f"POST {path}"
        note(name, send(open_, path, {"model": MODEL} | body), 200)
        note(name, send(open_, path, {"wibble": 1}), 400)
        note(name, send(keyed, path, body), 401)
        note(name, send(open_, path, body | {"model": "other"}), 404)
        note(name, call(open_, "POST", path, content=b" " * (17 << 20), headers=JSON), 413)
        note(name, send(open_, path, body, {}), 415)
    script.fail_after = 0
    for path in (CHAT, TEXT):
        note(f"POST {path}", send(open_, path, {"model": MODEL} | bodies[path]), 503)
    script.fail_after, script.room = None, 0
    for path in (CHAT, TEXT):
        note(f"POST {path}", send(open_, path, {"model": MODEL} | bodies[path]), 429)
    for path, told in (("/v1/models", "/v1/models"), (f"/v1/models/{MODEL}", "/v1/models/{model_id}")):
        note(f"GET {told}", call(open_, "GET", path), 200)
        note(f"GET {told}", call(keyed, "GET", path), 401)
    note("GET /v1/models/{model_id}", call(open_, "GET", "/v1/models/other"), 404)
    note("GET /metrics", call(open_, "GET", "/metrics"), 200)
    note("GET /metrics", call(keyed, "GET", "/metrics"), 401)
    note("GET /health", call(open_, "GET", "/health"), 200)
    script.sick = "no worker"
    note("GET /health", call(open_, "GET", "/health"), 503)
    _ask_admin(open_, keyed, script, note)
    assert seen == {name: set(operation["responses"]) for name, operation in operations(document).items()}


def _ask_admin(open_: FastAPI, keyed: FastAPI, script: Script, note: Any) -> None:
    for path in ("/admin/status", "/admin/experts", "/admin/events", "/admin/changes/change-3"):
        name = f"GET {path.replace('change-3', '{change_id}')}"
        note(name, call(keyed, "GET", path, headers=ADMIN), 200)
        note(name, call(keyed, "GET", path), 401)
        note(name, call(open_, "GET", path), 403)
    for path, told in (("/admin/events", "/admin/events"), ("/admin/changes/c", "/admin/changes/{change_id}")):
        note(f"GET {told}", call(keyed, "GET", f"{path}?wibble=1", headers=ADMIN), 400)
    bodies: dict[str, dict[str, Any]] = {
        "scale": {"hosts": 2},
        "rebalance": {},
        "drain": {"host": "host-0"},
        "replicas": {"replicas": 2},
        "room": {"hosts": 1},
    }
    for kind, body in bodies.items():
        path = f"/admin/experts/{kind}"
        name = f"POST {path}"
        script.refusal = None
        note(name, send(keyed, path, body, JSON | ADMIN), 200 if kind == "room" else 202)
        note(name, send(keyed, path, {"wibble": 1}, JSON | ADMIN), 400)
        note(name, send(keyed, path, body), 401)
        note(name, send(open_, path, body), 403)
        script.refusal = ChangeRefused("another is under way", busy=True)
        note(name, send(keyed, path, body, JSON | ADMIN), 409)
        note(name, call(keyed, "POST", path, content=b" " * (17 << 20), headers=JSON | ADMIN), 413)
        note(name, send(keyed, path, body, ADMIN), 415)
        script.refusal = GenerationFailed("the controller is being restarted")
        note(name, send(keyed, path, body, JSON | ADMIN), 503)
    script.away = True
    for path in ("/admin/status", "/admin/experts", "/admin/events"):
        note(f"GET {path}", call(keyed, "GET", path, headers=ADMIN), 503)
    script.story = [GenerationFailed("the controller is being restarted")]
    note("GET /admin/changes/{change_id}", call(keyed, "GET", "/admin/changes/c", headers=ADMIN), 503)
    script.story = [None]
    note("GET /admin/changes/{change_id}", call(keyed, "GET", "/admin/changes/c", headers=ADMIN), 404)
