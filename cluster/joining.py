"""Who belongs to a service, when its application is deployed again: what must be the same, and what is taken on."""

import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.change import ChangeRefused, Wish
from cluster.conductor import Conductor
from cluster.spec import ServiceSpec
from model.checkpoint import Checkpoint

FIXED = (
    *("model", "adapters", "transport", "tls", "node_resource", "gpus"),
    *("follow_application", "trains", "idle_end_s", "lodges_with"),
)
"""Fields of a ServiceSpec that cannot change while its hosts run."""
REST_S = 30.0  # after a failed start, in which those who come are told of it instead of starting anew


class OtherFiles(ValueError):
    """Who comes reads other files than the service began with."""


class Joining:
    """What one controller knows of its service's description. Times are of a monotonic clock."""

    def __init__(self, spec: ServiceSpec, told: Mapping[str, Any] | None) -> None:
        """`told`: the last description's fields that may change, where an earlier life was told others."""
        self._spec = spec
        self.told = dict(told) if told is not None else _changing(spec)
        self._contents: str | None = None
        self._failed_s: float | None = None
        self._wishes: deque[Wish] = deque()

    def opened(self, contents: str) -> None:
        """The service's files are these: see `contents_of`."""
        self._contents = contents

    def failed(self, now_s: float) -> None:
        """The service could not start."""
        self._failed_s = now_s

    def belongs(self, spec: ServiceSpec, now_s: float) -> bool:
        """False where a service of this description begins anew, as it does a while after a start that failed."""
        rested = self._failed_s is not None and now_s > self._failed_s + REST_S
        return not rested and _fixed(spec) == _fixed(self._spec)

    def check(self, contents: str) -> None:
        """Raises OtherFiles where the service began with other files than these."""
        if self._contents not in (None, contents):
            raise OtherFiles(
                f"{self._spec.model} is not here what this service began with: its files were changed, or differ from "
                "node to node; make them the same, or delete the application and deploy it again"
            )

    def take_on(self, spec: ServiceSpec) -> dict[str, Any]:
        """What a new description has otherwise than the last one. Numbers of hosts and replicas become wishes.

        What the service was asked for since, by `shoal experts` for one, stays where the descriptions agree.
        """
        news = {name: value for name, value in _changing(spec).items() if value != self.told.get(name, value)}
        self.told = _changing(spec)
        if "hosts" in news and spec.node_resource is None:
            self._wishes.append(Wish("scale", hosts=spec.hosts, why="the application was deployed with it"))
        if "replicas" in news:
            self._wishes.append(Wish("replicas", replicas=spec.replicas, why="the application was deployed with it"))
        return news

    def pursue(self, conductor: Conductor, now_s: float) -> None:
        """Begin the next wish, once nothing else is under way."""
        if not self._wishes or conductor.change is not None or not conductor.ever_ready:
            return
        wish = self._wishes.popleft()
        try:
            conductor.request(wish, now_s)
        except ChangeRefused as refused:
            if refused.busy:
                self._wishes.appendleft(wish)
            else:
                conductor.events.record("redeployment_refused", now_s, wish=wish.kind, reason=str(refused))


def contents_of(checkpoint: Checkpoint, adapters: Sequence[str]) -> str:
    """Hex digits over all tensors' names, shapes and dtypes, the norms' values, and names and sizes of adapters' files.

    It reads little, and tells models of one shape apart.
    """
    digest = hashlib.sha256(checkpoint.fingerprint().encode())
    norms = sorted(name for name, entry in checkpoint.entries.items() if len(entry.shape) == 1)
    for values in Checkpoint.tensors(checkpoint, norms):  # the files', whatever is laid over them
        digest.update(values.float().contiguous().numpy().data)
    for adapter in adapters:
        for file in sorted(Path(adapter).iterdir()):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:32]


def _fixed(spec: ServiceSpec) -> str:
    fields = asdict(spec)
    return json.dumps({name: fields[name] for name in FIXED}, default=str)  # a tuple that was sent may be a list


def _changing(spec: ServiceSpec) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(spec).items() if name not in (*FIXED, "name")}
    return fields | {"resources": dict(spec.resources)}
