"""What a controller remembers across its own death, in Ray's key-value store."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from cluster.node_follower import Desired
from cluster.saved import SavedState
from model.checkpoint import Stamps

KV_NAMESPACE = b"shoal"


@dataclass(frozen=True, slots=True)
class ControllerState:
    """The secret of the data plane, the conductor's state, the actors, and the checkpoint's files as first seen."""

    token: str
    core: SavedState | None = None  # None before the first host was started
    stamps: Mapping[str, Stamps] = field(default_factory=dict)  # by node, each of which may have files of its own
    actors: tuple[str, ...] = ()  # names of all that were started and are not known to have ended
    desired: Desired = field(default_factory=Desired)  # of hosts that follow nodes
    joining: Mapping[str, Any] | None = None  # `cluster.joining.Joining.state`; None: as the first life was told


def save_state(service: str, state: ControllerState) -> None:
    raw = {
        "token": state.token,
        "stamps": {node: dict(stamps) for node, stamps in state.stamps.items()},
        "core": state.core.to_json() if state.core is not None else None,
        "actors": list(state.actors),
        "desired": state.desired.to_json(),
        "joining": dict(state.joining) if state.joining is not None else None,
    }
    _internal_kv_put(service.encode(), json.dumps(raw).encode(), overwrite=True, namespace=KV_NAMESPACE)


def load_state(service: str) -> ControllerState | None:
    """What the last life saved; None when there was none."""
    text = _internal_kv_get(service.encode(), namespace=KV_NAMESPACE)
    if text is None:
        return None
    raw = json.loads(text)
    return ControllerState(
        token=str(raw["token"]),
        core=SavedState.from_json(raw["core"]) if raw["core"] is not None else None,
        stamps={
            node: {name: (int(size), int(changed)) for name, (size, changed) in stamps.items()}
            for node, stamps in raw["stamps"].items()
        },
        actors=tuple(map(str, raw["actors"])),
        desired=Desired.from_json(raw["desired"]),
        joining=raw.get("joining"),
    )


def delete_state(service: str) -> None:
    _internal_kv_del(service.encode(), namespace=KV_NAMESPACE)
