"""The little that a controller must remember across its own death, in Ray's key-value store."""

import json
from dataclasses import dataclass

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

KV_NAMESPACE = b"shoal"


@dataclass(frozen=True, slots=True)
class ControllerState:
    """Epoch last published, the secret of the data plane, and each host's last generation."""

    epoch: int
    token: str
    generations: dict[str, int]


def save_state(service: str, state: ControllerState) -> None:
    raw = {"epoch": state.epoch, "token": state.token, "generations": state.generations}
    _internal_kv_put(service.encode(), json.dumps(raw).encode(), overwrite=True, namespace=KV_NAMESPACE)


def load_state(service: str) -> ControllerState | None:
    """What the last life saved; None when there was none."""
    raw = _internal_kv_get(service.encode(), namespace=KV_NAMESPACE)
    if raw is None:
        return None
    fields = json.loads(raw)
    return ControllerState(int(fields["epoch"]), str(fields["token"]), dict(fields["generations"]))


def delete_state(service: str) -> None:
    _internal_kv_del(service.encode(), namespace=KV_NAMESPACE)
