"""What the fake Kubernetes keeps: objects by place, their versions, and what happened to them."""

import copy
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

NAMESPACE = "default"  # of the releases


class NotFound(LookupError):
    """No such object."""


class Conflict(ValueError):
    """It exists already, or was changed meanwhile."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object lives; `namespace` is empty for what has none."""

    resource: str  # plural, with its group: rayclusters.ray.io, pods
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Event:
    """ADDED, MODIFIED or DELETED, and the object as it was then."""

    kind: str
    place: Place
    object: Object

    @property
    def version(self) -> int:
        return int(self.object["metadata"]["resourceVersion"])


Admit = Callable[[Place, Object], None]


class Store:
    """Every change gets the next version, and is remembered: that is what watches read."""

    def __init__(self, admit: Admit | None = None) -> None:
        """`admit` may change an object that is about to be stored, or refuse it with ValueError."""
        self._admit = admit
        self._changed = threading.Condition(threading.RLock())
        self._objects: dict[Place, Object] = {}
        self._applied: dict[tuple[Place, str], Object] = {}  # what each field manager wanted last
        self._events: list[Event] = []
        self._closed = False

    @property
    def version(self) -> int:
        return len(self._events)

    def get(self, place: Place) -> Object:
        """A copy; raises NotFound."""
        with self._changed:
            if place not in self._objects:
                raise NotFound(f'{place.resource} "{place.name}" not found')
            return copy.deepcopy(self._objects[place])

    def places(self) -> set[Place]:
        """Where there are objects."""
        with self._changed:
            return set(self._objects)

    def since(self, after: int) -> Sequence[Event]:
        """What has happened after a version."""
        with self._changed:
            return tuple(self._events[after:])

    def list(self, resource: str, namespace: str = "") -> tuple[list[Object], int]:
        """Copies in order of their names, of all namespaces if none is given, and the version of the list."""
        with self._changed:
            found = [
                copy.deepcopy(each)
                for place, each in sorted(self._objects.items(), key=lambda item: (item[0].namespace, item[0].name))
                if place.resource == resource and namespace in ("", place.namespace)
            ]
            return found, self.version

    def create(self, place: Place, wanted: Object) -> Object:
        """Raises Conflict when it exists."""
        with self._changed:
            if place in self._objects:
                raise Conflict(f'{place.resource} "{place.name}" already exists')
            made = copy.deepcopy(wanted)
            made["metadata"] |= {
                "name": place.name,
                "uid": str(uuid.uuid4()),
                "creationTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "generation": 1,
            }
            if place.namespace:
                made["metadata"]["namespace"] = place.namespace
            return self._put("ADDED", place, made)

    def replace(self, place: Place, wanted: Object) -> Object:
        """Raises NotFound, or Conflict when `wanted` was read before the last change."""
        with self._changed:
            old = self.get(place)
            made = copy.deepcopy(wanted)
            read = made["metadata"].get("resourceVersion")
            if read is not None and read != old["metadata"]["resourceVersion"]:
                raise Conflict(f'{place.resource} "{place.name}" was changed meanwhile')
            for name in ("uid", "creationTimestamp", "generation", "resourceVersion"):
                made["metadata"][name] = old["metadata"][name]
            if made == old:
                return old
            if made.get("spec") != old.get("spec"):
                made["metadata"]["generation"] += 1
            return self._put("MODIFIED", place, made)

    def merge(self, place: Place, patch: Object) -> Object:
        """A JSON merge patch: null removes, lists are replaced."""
        return self.replace(place, _merged(self.get(place), patch))

    def apply(self, place: Place, wanted: Object, manager: str, force: bool = False) -> Object:
        """Server-side apply: what the manager wanted before and wants no longer goes, what others set stays.

        Lists are atomic, as they are in custom resources unless these say otherwise. Raises Conflict when somebody else
        has set one of the wanted fields to something else, unless `force`.
        """
        with self._changed:
            before = self._applied.get((place, manager), {})
            live = self._objects.get(place, {})
            exists = place in self._objects
            if exists and not force and (field := _foreign(live, before, wanted)):
                raise Conflict(f"Apply failed with 1 conflict: somebody else has set {field}")
            made = _merged(copy.deepcopy(_without(live, before, wanted)), wanted, nulls=False)
            stored = self.replace(place, made) if exists else self.create(place, made)
            self._applied[place, manager] = copy.deepcopy(wanted)
            return stored

    def delete(self, place: Place) -> Object:
        """Raises NotFound."""
        with self._changed:
            gone = self.get(place)
            del self._objects[place]
            for key in [key for key in self._applied if key[0] == place]:
                del self._applied[key]
            self._record("DELETED", place, gone)
            return gone

    def follow(self, after: int, timeout_s: float) -> Iterator[Event | None]:
        """Events after a version as they happen, until the time is over or the store is closed; None: none just now."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self._changed:
                if self._closed:
                    return
                if self.version <= after:
                    self._changed.wait(min(0.2, max(0.0, deadline - time.monotonic())))
                fresh = self._events[after:]
            after += len(fresh)
            yield from fresh or (None,)

    def close(self) -> None:
        """End all that follow."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _put(self, kind: str, place: Place, made: Object) -> Object:
        if self._admit is not None:
            self._admit(place, made)
        self._objects[place] = made
        self._record(kind, place, made)
        return copy.deepcopy(made)

    def _record(self, kind: str, place: Place, made: Object) -> None:
        made["metadata"]["resourceVersion"] = str(self.version + 1)
        self._events.append(Event(kind, place, copy.deepcopy(made)))
        self._changed.notify_all()


def _merged(into: Object, patch: Object, nulls: bool = True) -> Object:
    for name, value in patch.items():
        if value is None and nulls:
            into.pop(name, None)
        elif isinstance(value, dict) and isinstance(into.get(name), dict):
            _merged(into[name], value, nulls)
        else:
            into[name] = copy.deepcopy(value)
    return into


def _foreign(live: Object, before: Object, wanted: Object) -> str | None:
    """A field that is wanted to be other than it is, and that is no longer what the manager had made it."""
    for name, value in wanted.items():
        if name in ("apiVersion", "kind") or name not in live or live[name] == value:
            continue
        if isinstance(value, dict) and isinstance(live[name], dict):
            known = before.get(name)
            if inner := _foreign(live[name], known if isinstance(known, dict) else {}, value):
                return f"{name}.{inner}"
        elif live[name] != before.get(name):
            return str(name)
    return None


def _without(live: Object, before: Object, wanted: Object) -> Object:
    """`live` less what was wanted `before` and is wanted no longer."""
    kept: Object = {}
    for name, value in live.items():
        known = before.get(name)
        if isinstance(value, dict) and isinstance(known, dict) and name in before:
            still = wanted.get(name)
            rest = _without(value, known, still if isinstance(still, dict) else {})
            if rest or name in wanted:
                kept[name] = rest
        elif name not in before or name in wanted:
            kept[name] = value
    return kept
