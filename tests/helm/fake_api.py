"""A Kubernetes API server small enough to read: what Helm needs of one, on loopback, over plain HTTP.

Discovery, create, read, replace, merge patch, server-side apply, delete, list and watch of any resource in `RESOURCES`.
Nothing runs here: `kubelet` decides what becomes of jobs and pods, and whoever else acts on objects subscribes.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.helm import protobuf
from tests.helm.fake_resources import RESOURCES, discovery, plural_of, resource_of
from tests.helm.fake_store import Conflict, Event, NotFound, Object, Place, Store

WATCH_S = 30.0
PATH = re.compile(
    r"^/(?:api|apis/(?P<group>[^/]+))/(?P<version>v[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<part>status|scale|log))?$"
)


@dataclass(frozen=True, slots=True)
class Request:
    """Which resource a request is about, and its query."""

    api_version: str
    kind: str
    place: Place  # its name is empty for a collection
    query: dict[str, str]


Listener = Callable[[Event], None]


class FakeApi:
    """A context manager; `url` is where it listens, `kubeconfig` what a client is told."""

    def __init__(self, kubelet: Callable[[Object], None] | None = None) -> None:
        """`kubelet` sets the status of each job and pod that is made: `run_at_once` if none is given."""
        self._kubelet = kubelet or run_at_once
        self.store = Store(self._admit)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self.store))
        self._server.daemon_threads = True
        self._threads = [threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def kubeconfig(self) -> str:
        cluster = {"name": "fake", "cluster": {"server": self.url}}
        context = {"name": "fake", "context": {"cluster": "fake", "user": "fake"}}
        document = {"apiVersion": "v1", "kind": "Config", "current-context": "fake"}
        users = [{"name": "fake", "user": {}}]
        return yaml.safe_dump(document | {"clusters": [cluster], "contexts": [context], "users": users})

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` with every event from now on, in a thread of its own."""
        after = self.store.version

        def follow() -> None:
            for event in self.store.follow(after, float("inf")):
                if event is not None:
                    listener(event)

        thread = threading.Thread(target=follow, daemon=True)
        self._threads.append(thread)
        thread.start()

    def __enter__(self) -> "FakeApi":
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join(5)

    def _admit(self, place: Place, made: Object) -> None:
        if place.resource in ("jobs.batch", "pods") and "status" not in made:
            self._kubelet(made)


def run_at_once(made: Object) -> None:
    """Every job completes and every pod succeeds as soon as it is made."""
    finish(made, ok=True)


def finish(made: Object, ok: bool) -> None:
    """Set the status of a job or pod that has ended."""
    if made["kind"] == "Job":
        condition = {"type": "Complete" if ok else "Failed", "status": "True", "reason": "Fake", "message": "fake"}
        made["status"] = {"conditions": [condition], ("succeeded" if ok else "failed"): 1}
    else:
        made["status"] = {"phase": "Succeeded" if ok else "Failed"}


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits for the acknowledgement of its headers

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                self._answer(body)
            except NotFound as error:
                self._refuse(404, "NotFound", str(error))
            except Conflict as error:
                self._refuse(409, "AlreadyExists" if "already" in str(error) else "Conflict", str(error))
            except ValueError as error:
                self._refuse(422, "Invalid", str(error))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        def _answer(self, body: bytes) -> None:
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
            if (document := discovery(url.path)) is not None:
                self._send(200, document)
                return
            request = _parse(url.path, query)
            if self.command == "GET" and query.get("watch") in ("true", "1"):
                self._watch(request)
            elif self.command == "GET":
                self._send(200, _read(store, request))
            elif self.command == "DELETE":
                self._send(200, _delete(store, request))
            else:
                content_type = self.headers["Content-Type"]
                wanted = protobuf.read_secret(body) if content_type == protobuf.CONTENT_TYPE else yaml.safe_load(body)
                self._send(*_write(store, request, self.command, content_type, wanted))

        def _send(self, status: int, document: Object) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _refuse(self, code: int, reason: str, message: str) -> None:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
            self._send(code, status | {"code": code, "reason": reason, "message": message})

        def _watch(self, request: Request) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for kind, seen in _watched(store, request):
                line = json.dumps({"type": kind, "object": seen}).encode() + b"\n" if kind else b""
                if line:
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                    self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

    return Handler


def _parse(path: str, query: dict[str, str]) -> Request:
    match = PATH.match(path)
    # /api/v1/namespaces/NAME is the namespace itself
    if match is None and (named := re.match(r"^/api/v1/namespaces(?:/([^/]+))?$", path)):
        return Request("v1", "Namespace", Place("namespaces", "", named[1] or ""), query)
    if match is None:
        raise NotFound(f"the server could not find {path}")
    group, version = match["group"], match["version"]
    api_version = f"{group}/{version}" if group else version
    kinds = [kind for kind in RESOURCES.get(api_version, ()) if plural_of(kind) == match["plural"]]
    if not kinds:
        raise NotFound(f"the server could not find {path}")
    place = Place(resource_of(api_version, kinds[0]), match["namespace"] or "", match["name"] or "")
    return Request(api_version, kinds[0], place, query)


def _read(store: Store, request: Request) -> Object:
    place = request.place
    if place.name:
        return store.get(place)
    found, version = store.list(place.resource, place.namespace)
    items = [each for each in found if _selected(each, request.query)]
    metadata = {"resourceVersion": str(version)}
    return {"kind": f"{request.kind}List", "apiVersion": request.api_version, "metadata": metadata, "items": items}


def _delete(store: Store, request: Request) -> Object:
    if request.place.name:
        store.delete(request.place)
    else:
        for each in _read(store, request)["items"]:
            metadata = each["metadata"]
            store.delete(Place(request.place.resource, metadata["namespace"], metadata["name"]))
    return {"kind": "Status", "apiVersion": "v1", "status": "Success"}


def _write(store: Store, request: Request, method: str, content_type: str, body: Object) -> tuple[int, Object]:
    place = request.place
    if "dryRun" in request.query:
        return 200, body
    if method == "POST":
        metadata = body["metadata"]
        named = metadata.get("name") or f"{metadata['generateName']}{store.version}"
        whole = {"apiVersion": request.api_version, "kind": request.kind} | body
        return 201, store.create(Place(place.resource, place.namespace, named), whole)
    if method == "PUT":
        return 200, store.replace(place, {"apiVersion": request.api_version, "kind": request.kind} | body)
    if content_type.startswith("application/apply-patch"):
        force = request.query.get("force") == "true"
        return 200, store.apply(place, body, request.query.get("fieldManager", ""), force)
    if content_type.startswith("application/merge-patch"):
        return 200, store.merge(place, body)
    raise ValueError(f"patches of type {content_type} are not known here; use server-side apply or a merge patch")


def _watched(store: Store, request: Request) -> Iterator[tuple[str, Object]]:
    """What a watch tells; an empty kind when there is nothing to tell."""
    query, place = request.query, request.place
    after = int(query.get("resourceVersion") or 0)
    if query.get("sendInitialEvents") == "true" or not after:
        listed = _read(store, request)
        after = int(listed["metadata"]["resourceVersion"])
        for each in listed["items"]:
            yield "ADDED", each
        if query.get("sendInitialEvents") == "true":
            metadata = {"resourceVersion": str(after), "annotations": {"k8s.io/initial-events-end": "true"}}
            yield "BOOKMARK", {"kind": request.kind, "apiVersion": request.api_version, "metadata": metadata}
    for event in store.follow(after, min(WATCH_S, float(query.get("timeoutSeconds") or WATCH_S))):
        if (
            event is not None
            and event.place.resource == place.resource
            and place.namespace in ("", event.place.namespace)
            and _selected(event.object, query)
        ):
            yield event.kind, event.object
        else:
            yield "", {}


def _selected(each: Object, query: dict[str, str]) -> bool:
    """Whether the label and field selectors, of equalities alone, choose this object."""
    labels = each["metadata"].get("labels", {})
    names = {"metadata.name": each["metadata"]["name"], "metadata.namespace": each["metadata"].get("namespace", "")}
    return all(
        where.get(name) == value
        for where, selector in ((labels, query.get("labelSelector", "")), (names, query.get("fieldSelector", "")))
        for name, _, value in (part.partition("=") for part in selector.split(",") if part)
    )


@contextmanager
def fake_cluster(kubelet: Callable[[Object], None] | None = None) -> Iterator[FakeApi]:
    """An API server with the namespace `default` in it."""
    with FakeApi(kubelet) as api:
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}
        api.store.create(Place("namespaces", "", "default"), namespace)
        yield api
