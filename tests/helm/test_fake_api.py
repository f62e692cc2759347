"""The stand-in for Kubernetes keeps the rules that the tests of releases rest on."""

import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helm.fake_api import FakeApi, fake_cluster
from tests.helm.fake_store import Conflict, Event, NotFound, Object, Place, Store

THING = Place("things.example.org", "a", "one")


def thing(**spec: Any) -> Object:
    return {"apiVersion": "example.org/v1", "kind": "Thing", "metadata": {"name": "one"}, "spec": spec}


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_cluster() as api:
        yield api


def call(api: FakeApi, method: str, path: str, body: Object | None = None, kind: str = "application/json") -> Object:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(api.url + path, data, {"Content-Type": kind}, method=method)
    with urllib.request.urlopen(request, timeout=5) as answer:
        read: Object = json.load(answer)
        return read


def test_apply_removes_what_its_manager_wants_no_longer_and_keeps_what_others_set(store: Store) -> None:
    store.apply(THING, thing(a=1, inner={"b": 2, "c": 3}), "helm")
    store.merge(THING, {"spec": {"theirs": 4, "inner": {"d": 5}}, "status": {"ready": True}})
    made = store.apply(THING, thing(inner={"c": 3}), "helm")
    assert made["spec"] == {"theirs": 4, "inner": {"c": 3, "d": 5}}
    assert made["status"] == {"ready": True}
    assert store.apply(THING, thing(), "helm")["spec"] == {"theirs": 4, "inner": {"d": 5}}


def test_apply_takes_nothing_that_somebody_else_has_changed_unless_forced(store: Store) -> None:
    store.apply(THING, thing(size=1, items=[{"n": 1}]), "helm")
    store.merge(THING, {"spec": {"items": [{"n": 2}]}})
    with pytest.raises(Conflict, match=r"spec\.items"):
        store.apply(THING, thing(size=2, items=[{"n": 1}]), "helm")
    assert store.get(THING)["spec"] == {"size": 1, "items": [{"n": 2}]}
    assert store.apply(THING, thing(size=2, items=[{"n": 2}]), "helm")["spec"]["size"] == 2
    store.merge(THING, {"spec": {"items": [{"n": 3}]}})
    assert store.apply(THING, thing(size=2, items=[{"n": 1}]), "helm", force=True)["spec"]["items"] == [{"n": 1}]


def test_generation_counts_changes_of_the_spec_and_nothing_else(store: Store) -> None:
    made = store.create(THING, thing(a=1))
    assert made["metadata"]["generation"] == 1
    assert store.merge(THING, {"status": {"ready": True}})["metadata"]["generation"] == 1
    assert store.merge(THING, {"spec": {"a": 2}})["metadata"]["generation"] == 2
    version = store.version
    store.merge(THING, {"spec": {"a": 2}})
    assert store.version == version


def test_what_was_read_before_the_last_change_does_not_replace_it(store: Store) -> None:
    old = store.create(THING, thing(a=1))
    store.merge(THING, {"spec": {"a": 2}})
    with pytest.raises(Conflict, match="changed meanwhile"):
        store.replace(THING, old)
    with pytest.raises(Conflict, match="already exists"):
        store.create(THING, thing())
    store.delete(THING)
    with pytest.raises(NotFound):
        store.get(THING)


def test_followers_hear_everything_once_and_in_order(api: FakeApi) -> None:
    heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
    api.subscribe(heard.put)
    path = "/apis/ray.io/v1/namespaces/default/rayclusters"
    call(api, "POST", path, {"metadata": {"name": "c"}, "spec": {"n": 1}})
    call(api, "PATCH", f"{path}/c", {"spec": {"n": 2}}, "application/merge-patch+json")
    call(api, "DELETE", f"{path}/c")
    events = [heard.get(timeout=5) for _ in range(3)]
    assert [event.kind for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert [event.object["spec"]["n"] for event in events] == [1, 2, 2]
    assert heard.empty()


def test_a_watch_tells_what_is_there_and_then_what_happens(api: FakeApi) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    call(api, "POST", path, {"metadata": {"name": "a", "labels": {"x": "1"}}})
    call(api, "POST", path, {"metadata": {"name": "b"}})
    query = "?watch=true&sendInitialEvents=true&timeoutSeconds=5&labelSelector=x%3D1"
    with urllib.request.urlopen(f"{api.url}{path}{query}", timeout=5) as watch:
        first, mark = json.loads(watch.readline()), json.loads(watch.readline())
        assert (first["type"], first["object"]["metadata"]["name"]) == ("ADDED", "a")
        assert mark["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
        call(api, "DELETE", f"{path}/b")
        call(api, "DELETE", f"{path}/a")
        last = json.loads(watch.readline())
        assert (last["type"], last["object"]["metadata"]["name"]) == ("DELETED", "a")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/apis/ray.io/v1/namespaces/default/rayclusters/none", 404),
        ("GET", "/apis/unknown.io/v1/namespaces/default/things", 404),
        ("POST", "/api/v1/namespaces", 409),
        ("PATCH", "/api/v1/namespaces/default", 422),
    ],
)
def test_errors_have_the_api_servers_shape(api: FakeApi, method: str, path: str, status: int) -> None:
    body = None if method == "GET" else {"metadata": {"name": "default"}}
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(api, method, path, body, "application/json")
    assert refused.value.code == status
    document = json.load(refused.value)
    assert (document["kind"], document["code"]) == ("Status", status)
