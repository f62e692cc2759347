"""Admin routes: a wish reaches the controller as it was asked, and a bad one is refused by name."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ray.exceptions import RayActorError, RayTaskError

from attention.requests import GenerateRequest, SamplingParams
from cluster.change import ChangeRefused, Wish, not_ready
from cluster.joining import OtherFiles
from cluster.spec import ServiceSpec
from model.generation import GenerationDefaults
from model.tokenizer import Tokenizer
from services.backend import GenerationFailed, Reading, ServedModel
from services.pool import WorkerPool
from tests.services.script import Script, call, change_document, make_app, service_report
from tests.services.test_errors import assert_error

TOKEN = {"Authorization": "Bearer the-admin-token"}


@pytest.fixture
def app(script: Script) -> FastAPI:
    return make_app(script, api_key="the-right-key", admin_token="the-admin-token")


def admin(app: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
    return call(app, method, f"/admin/{path}", headers=TOKEN, **arguments)


@pytest.mark.parametrize(
    ("action", "body", "wish"),
    [
        ("scale", {"hosts": 3}, Wish("scale", hosts=3)),
        ("scale", {"hosts": 1, "leaving": ["b", "a"]}, Wish("scale", hosts=1, leaving=("b", "a"))),
        ("rebalance", {}, Wish("rebalance")),
        ("rebalance", None, Wish("rebalance")),
        ("drain", {"host": "host-1"}, Wish("drain", leaving=("host-1",))),
        ("drain", {"hosts": ["host-1", "host-0"]}, Wish("drain", leaving=("host-1", "host-0"))),
        ("replicas", {"replicas": 2}, Wish("replicas", replicas=2)),
        ("replicas", {"replicas": 1, "extra": 0}, Wish("replicas", replicas=1, extra=0)),
    ],
)
def test_a_wish_arrives_and_its_change_can_be_found(
    app: FastAPI, script: Script, action: str, body: dict[str, Any] | None, wish: Wish
) -> None:
    answer = admin(app, "POST", f"experts/{action}", **({} if body is None else {"json": body}))
    assert (answer.status_code, answer.json()) == (202, change_document())
    assert script.wishes == [wish]
    found = call(app, "GET", answer.headers["location"], headers=TOKEN)
    assert found.json()["id"] == "change-3"


@pytest.mark.parametrize(
    ("action", "body", "said", "param"),
    [
        ("scale", {"hosts": 0}, "greater than or equal to 1; given 0", "hosts"),
        ("scale", {"hosts": "3"}, "valid integer; given '3'", "hosts"),
        ("scale", {"hosts": 10**9}, "less than or equal to 4096", "hosts"),
        ("scale", {}, "required", "hosts"),
        ("scale", {"hosts": 2, "leaving": ["a", "a"]}, "'a' is named more than once", "leaving"),
        ("scale", {"hosts": 2, "leaving": [""]}, "at least 1 character", "leaving.0"),
        ("scale", {"host": 2, "hosts": 2}, "unknown parameter 'host'", "host"),
        ("rebalance", {"now": True}, "unknown parameter 'now'", "now"),
        ("drain", {}, "give 'host', the id of one expert host, or 'hosts'", None),
        ("drain", {"host": "a", "hosts": ["b"]}, "give 'host'", None),
        ("drain", {"hosts": []}, "at least 1 item", "hosts"),
        ("room", {}, "give 'hosts', how many there may be, or 'node'", None),
        ("room", {"hosts": 2, "node": "a"}, "give 'hosts'", None),
        ("room", {"hosts": 0}, "given 0", "hosts"),
        ("room", {"node": ""}, "at least 1 character", "node"),
        ("replicas", {"replicas": 0}, "given 0", "replicas"),
        ("replicas", {"replicas": 1, "extra": -1}, "given -1", "extra"),
        ("replicas", {"replicas": True}, "given True", "replicas"),
    ],
)
def test_a_bad_wish_is_refused_by_name(
    app: FastAPI, script: Script, action: str, body: dict[str, Any], said: str, param: str | None
) -> None:
    assert_error(admin(app, "POST", f"experts/{action}", json=body), 400, said, param)
    assert script.wishes == []
    assert script.rooms == []


def test_room_is_asked_for_as_often_as_it_takes(app: FastAPI, script: Script) -> None:
    script.room_answers = [{"done": False, "change": change_document()}, {"done": True, "change": None}]
    for body, done in (({"hosts": 2}, False), ({"node": "10.0.0.7"}, True)):
        answer = admin(app, "POST", "experts/room", json=body)
        assert (answer.status_code, answer.json()["done"]) == (200, done)
    assert script.rooms == [(2, None), (None, "10.0.0.7")]
    script.refusal = ChangeRefused("node a is the last one")
    assert_error(admin(app, "POST", "experts/room", json={"node": "a"}), 400, "node a is the last one")
    script.refusal = ChangeRefused("not ready", busy=True)
    assert_error(admin(app, "POST", "experts/room", json={"hosts": 1}), 409, "not ready")


def test_a_refused_change_says_why_and_whether_to_come_back(app: FastAPI, script: Script) -> None:
    script.refusal = ChangeRefused("9 expert hosts; this model can be spread over 1 to 4")
    assert assert_error(admin(app, "POST", "experts/scale", json={"hosts": 9}), 400, "over 1 to 4")["code"] == (
        "change_refused"
    )
    script.refusal = ChangeRefused("change-2 is under way", busy=True)
    assert assert_error(admin(app, "POST", "experts/rebalance", json={}), 409, "change-2 is under way")["code"] == (
        "change_under_way"
    )
    script.refusal = not_ready(None)
    for action, body in (("scale", {"hosts": 2}), ("room", {"hosts": 1})):
        refusal = assert_error(admin(app, "POST", f"experts/{action}", json=body), 409, "ask again when it is")
        assert refusal["code"] == "not_ready"
    script.refusal = not_ready("the checkpoint has no config.json")  # and never will be
    assert assert_error(admin(app, "POST", "experts/rebalance", json={}), 400, "cannot start")["code"] == (
        "change_refused"
    )
    script.refusal = GenerationFailed("the controller is being restarted; ask again")
    assert_error(admin(app, "POST", "experts/rebalance", json={}), 503, "ask again")


def test_a_watcher_waits_for_another_version_but_not_for_ever(app: FastAPI, script: Script) -> None:
    admin(app, "GET", "changes/change-3")
    admin(app, "GET", "changes/change-3?seen=5&timeout_s=2.5")
    admin(app, "GET", "changes/change-3?seen=5&timeout_s=1e9")
    assert script.watched == [("change-3", -1, 20.0), ("change-3", 5, 2.5), ("change-3", 5, 30.0)]
    script.story = [None]
    assert_error(admin(app, "GET", "changes/change-9"), 404, "no change 'change-9'; GET /admin/experts")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("changes/c?seen=x", "seen: Input should be a valid integer"),
        ("changes/c?seen=1.5", "seen: Input should be a valid integer"),
        ("changes/c?timeout_s=-1", "timeout_s: Input should be greater than or equal to 0"),
        ("changes/c?timeout_s=nan", "timeout_s: Input should be"),
        ("changes/c?timeout=5", "timeout': remove it"),
        ("events?after=-1", "after: Input should be greater than or equal to 0"),
        ("events?limit=0", "limit: Input should be greater than or equal to 1"),
        ("events?limit=501", "limit: Input should be less than or equal to 500"),
        ("events?after=" + "9" * 40, "after: Input should be"),
    ],
)
def test_a_bad_query_is_refused_by_name(app: FastAPI, script: Script, path: str, said: str) -> None:
    assert_error(admin(app, "GET", path), 400, said)
    assert script.watched == []


def test_events_are_told_after_a_number(app: FastAPI, script: Script) -> None:
    script.log = [{"number": n, "kind": "epoch", "at": "t", "fields": {}} for n in range(1, 6)]
    numbers = [event["number"] for event in admin(app, "GET", "events?after=1&limit=3").json()["events"]]
    assert numbers == [2, 3, 4]


def test_the_experts_part_of_the_status(app: FastAPI, script: Script) -> None:
    script.report = service_report()
    experts = admin(app, "GET", "experts").json()
    assert experts["members"] == ["host-0", "host-1"]
    assert experts["changes"][0]["phase"] == "done"
    assert "attention_workers" not in experts


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "experts"), ("POST", "experts/scale"), ("GET", "changes/c"), ("GET", "events"), ("POST", "experts/drain")],
)
@pytest.mark.parametrize("prefix", ["", "/mounted"])
def test_only_the_admin_token_opens_the_routes(script: Script, method: str, path: str, prefix: str) -> None:
    """Wherever the application is mounted."""

    def ask(app: FastAPI, key: str | None) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=prefix)
            async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as client:
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                return await client.request(method, f"{prefix}/admin/{path}", headers=headers)

        return asyncio.run(send())

    script.report = service_report()
    guarded = make_app(script, api_key="the-right-key", admin_token="the-admin-token")
    assert_error(ask(guarded, "the-right-key"), 401, "Bearer")
    assert_error(ask(guarded, None), 401, "Bearer")
    assert ask(guarded, "the-admin-token").status_code in (200, 400)
    assert_error(ask(make_app(script), None), 403, "no admin token is set")
    assert script.wishes == []


class Remote:
    """A method of an actor that is not there: calls go to a function, and come back as Ray's do."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    async def remote(self, *arguments: Any) -> Any:
        answer = self._answer(*arguments)
        if isinstance(answer, (ChangeRefused, OtherFiles)):
            failure = RayTaskError("begin_change", f"Traceback\n  x\n{answer}", answer, "actor", 1, "127.0.0.1")
            raise failure.as_instanceof_cause()
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeController:
    def __init__(self, answer: Callable[..., Any]) -> None:
        for name in ("begin_change", "watch_change", "events", "status"):
            setattr(self, name, Remote(answer))
        self.join = Remote(lambda *_: RayActorError())


@pytest.fixture
def ask_pool(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Callable[..., Any]:
    """Call a method of a pool whose controller answers by a function."""

    def ask(answer: Callable[..., Any], method: str, *arguments: Any) -> Any:
        monkeypatch.setattr("services.pool.find_controller", lambda namespace: FakeController(answer))

        async def run() -> Any:
            model = ServedModel("m", 1, 100, 100, "fp", tokenizer, GenerationDefaults(1.0, 1.0))
            return await getattr(WorkerPool(model, ServiceSpec("nowhere", ""), "", 4, 60.0), method)(*arguments)

        return asyncio.run(run())

    return ask


def test_the_controller_is_asked_in_plain_data(ask_pool: Callable[..., Any]) -> None:
    wish = Wish("scale", hosts=2, leaving=("host-0",))
    asked = {"kind": "scale", "hosts": 2, "leaving": ["host-0"], "replicas": None, "extra": None, "why": None}
    assert ask_pool(lambda wish: {"asked": wish}, "begin_change", wish) == {"asked": asked}
    assert ask_pool(lambda *given: list(given), "watch_change", "change-3", 5, 2.0) == ["change-3", 5, 2.0]
    assert ask_pool(lambda *given: list(given), "events", 5, 20) == [5, 20]


def test_an_ingress_that_reads_other_files_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    controller = FakeController(list)
    controller.join = Remote(lambda *_: OtherFiles("/models/m is not here what this service began with"))
    monkeypatch.setattr("services.pool.find_controller", lambda namespace: controller)

    async def run() -> str | None:
        model = ServedModel("m", 1, 100, 100, "fp", tokenizer, GenerationDefaults(1.0, 1.0))
        pool = WorkerPool(model, ServiceSpec("nowhere", ""), "", 4, 60.0)
        await asyncio.sleep(0.1)
        with pytest.raises(GenerationFailed, match="/models/m is not here"):
            await anext(pool.generate(GenerateRequest("a", (5,), SamplingParams(max_tokens=1))))
        return await pool.unhealthy()

    assert "/models/m is not here" in (asyncio.run(run()) or "")


@pytest.mark.parametrize("busy", [False, True])
def test_a_refusal_crosses_ray_without_its_traceback(ask_pool: Callable[..., Any], busy: bool) -> None:
    with pytest.raises(ChangeRefused) as refused:
        ask_pool(lambda wish: ChangeRefused("no such host", busy), "begin_change", Wish("drain"))
    assert (str(refused.value), refused.value.busy) == ("no such host", busy)


@pytest.mark.parametrize("failure", [RayActorError(), ValueError("no actor of this name")])
def test_a_controller_that_is_away_fails_a_call_but_not_a_scrape(
    ask_pool: Callable[..., Any], failure: Exception
) -> None:
    for method, arguments in (("begin_change", (Wish("drain"),)), ("watch_change", ("c", 1, 1.0)), ("events", (0, 9))):
        with pytest.raises(GenerationFailed, match="ask again"):
            ask_pool(lambda *given: failure, method, *arguments)
    assert ask_pool(lambda *given: failure, "metrics") == Reading(0, 0, None)
    assert ask_pool(lambda: {"epoch": 1}, "metrics").status == {"epoch": 1, "in_flight": 0, "model_id": "m"}
