"""Admin routes: the expert hosts, the changes that an operator asks for, and what happened."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from cluster.change import ChangeRefused, NotReady, Wish
from services.backend import Backend
from services.openai.errors import ApiError
from services.openai.strict import Strict
from services.openapi import BODY, refusals

MAX_HOSTS = 4096
MAX_EXTRA = 1 << 20
MAX_NUMBER = 1 << 53  # JSON numbers are exact up to here
MAX_EVENTS = 500
MAX_WATCH_S = 30.0
EXPERT_FIELDS = (
    "epoch",
    "state",
    "reason",
    "replicas",
    "extra",
    "members",
    "expert_hosts",
    "nodes",
    "load",
    "change",
    "changes",
)


def _distinct(ids: list[str]) -> list[str]:
    twice = next((host_id for host_id in ids if ids.count(host_id) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is named more than once; name each host once")
    return ids


HostId = Annotated[str, Field(min_length=1, max_length=128)]
HostIds = Annotated[list[HostId], Field(max_length=MAX_HOSTS), AfterValidator(_distinct)]


class Scale(Strict):
    """So many hosts; those named leave first, then the youngest."""

    hosts: Annotated[int, Field(ge=1, le=MAX_HOSTS)]
    leaving: HostIds = Field(default_factory=list)


class Rebalance(Strict):
    """Spread the experts by their load."""


class Drain(Strict):
    """Empty hosts and end them: `host`, or several `hosts`."""

    host: HostId | None = None
    hosts: Annotated[HostIds, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Drain":
        if (self.host is None) == (self.hosts is None):
            raise ValueError("give 'host', the id of one expert host, or 'hosts', a list of ids")
        return self


class Room(Strict):
    """Before nodes go: no more hosts than `hosts`, or none on `node`, a node's id, address or name."""

    hosts: Annotated[int, Field(ge=1, le=MAX_HOSTS)] | None = None
    node: HostId | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Room":
        if (self.hosts is None) == (self.node is None):
            raise ValueError("give 'hosts', how many there may be, or 'node', the one that shall have none")
        return self


class Replicas(Strict):
    """So many hosts hold each expert, and `extra` further copies a layer go to the busiest; null: as many as now."""

    replicas: Annotated[int, Field(ge=1, le=MAX_HOSTS)]
    extra: Annotated[int, Field(ge=0, le=MAX_EXTRA)] | None = None


class WatchQuery(BaseModel):
    """Which version the caller knows, and how long to wait for another."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    seen: int = Field(-1, ge=-1, le=MAX_NUMBER)
    timeout_s: float = Field(20.0, ge=0, description=f"at most {MAX_WATCH_S:.0f} are waited")


class EventsQuery(BaseModel):
    """The oldest `limit` events that are remembered and numbered above `after`."""

    model_config = ConfigDict(extra="forbid")

    after: int = Field(0, ge=0, le=MAX_NUMBER)
    limit: int = Field(200, ge=1, le=MAX_EVENTS)


@contextmanager
def _refusals() -> Iterator[None]:
    """What the controller refuses, as the client is told."""
    try:
        yield
    except ChangeRefused as refused:
        raise ApiError(str(refused), 409 if refused.busy else 400, code=_code(refused)) from None


def _code(refused: ChangeRefused) -> str:
    """By which a script tells refusals apart."""
    if isinstance(refused, NotReady):
        return "not_ready"
    return "change_under_way" if refused.busy else "change_refused"


def add_admin_routes(app: FastAPI, backend: Backend) -> None:
    """Routes under /admin, which the application guards."""

    reading = refusals(401, 403, 503)
    changing = refusals(*BODY, 401, 403, 409, 503)

    async def begin(request: Request, wish: Wish) -> Response:
        with _refusals():
            change = await backend.begin_change(wish)
        root = str(request.scope.get("root_path", "")).rstrip("/")
        return JSONResponse(change, 202, {"Location": f"{root}/admin/changes/{change['id']}"})

    @app.get("/admin/experts", responses=reading)
    async def experts() -> dict[str, Any]:
        status = await backend.status()
        return {name: status[name] for name in EXPERT_FIELDS}

    @app.post("/admin/experts/scale", status_code=202, responses=changing)
    async def scale(body: Scale, request: Request) -> Response:
        return await begin(request, Wish("scale", hosts=body.hosts, leaving=tuple(body.leaving)))

    @app.post("/admin/experts/rebalance", status_code=202, responses=changing)
    async def rebalance(request: Request, body: Rebalance | None = None) -> Response:
        return await begin(request, Wish("rebalance"))

    @app.post("/admin/experts/drain", status_code=202, responses=changing)
    async def drain(body: Drain, request: Request) -> Response:
        leaving = tuple(body.hosts or ()) if body.host is None else (body.host,)
        return await begin(request, Wish("drain", leaving=leaving))

    @app.post("/admin/experts/room", responses=changing)
    async def room(body: Room) -> dict[str, Any]:
        with _refusals():
            return await backend.make_room(body.hosts, body.node)

    @app.post("/admin/experts/replicas", status_code=202, responses=changing)
    async def replicas(body: Replicas, request: Request) -> Response:
        return await begin(request, Wish("replicas", replicas=body.replicas, extra=body.extra))

    @app.get("/admin/changes/{change_id}", responses=refusals(400, 401, 403, 404, 503))
    async def change(change_id: str, query: Annotated[WatchQuery, Query()]) -> dict[str, Any]:
        found = await backend.watch_change(change_id, query.seen, min(query.timeout_s, MAX_WATCH_S))
        if found is None:
            raise ApiError(f"there is no change {change_id!r}; GET /admin/experts shows the last ones", 404)
        return found

    @app.get("/admin/events", responses=refusals(400, 401, 403, 503))
    async def events(query: Annotated[EventsQuery, Query()]) -> dict[str, Any]:
        return {"events": await backend.events(query.after, query.limit)}
