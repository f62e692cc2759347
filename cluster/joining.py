"""Who belongs to a service, when its application is deployed again: what must be the same, and what is taken on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.change import Change, ChangeRefused, Phase, Wish
from cluster.conductor import Conductor
from cluster.spec import ServiceSpec
from model.adapters.identity import dense_identity
from model.checkpoint import Checkpoint, CheckpointError

FIXED = (
    *("model", "adapters", "transport", "tls", "node_resource", "gpus"),
    *("follow_application", "trains", "idle_end_s", "lodges_with"),
)
"""Fields of a ServiceSpec that cannot change while its hosts run."""
NUMBERS = ("hosts", "replicas")
"""Fields that a change of the hosts brings about; they count as told once it is done."""
REST_S = 30.0  # after a failed start, in which those who come are told of it instead of starting anew
AGAIN_S = 30.0  # after a change for new numbers that was rolled back
TRIES = 3
WHY = "the application was deployed with it"


class OtherFiles(CheckpointError):
    """Who comes reads other files than the service began with."""


class Joining:
    """What one controller knows of its service's description. Times are of a monotonic clock."""

    def __init__(self, spec: ServiceSpec, saved: Mapping[str, Any] | None) -> None:
        """`saved`: what an earlier life's `state` was, where it was told anything since the first description."""
        self._spec = spec
        self.told: dict[str, Any] = dict(saved["told"]) if saved is not None else _changing(spec)
        self._wanted: dict[str, int] = dict(saved["wanted"]) if saved is not None else {}  # of NUMBERS
        self._change: Change | None = None  # that brings them about
        self._tries = 0
        self._next_s = 0.0
        self._contents: str | None = None
        self._failed_s: float | None = None

    @property
    def state(self) -> dict[str, Any]:
        """What the next life has to know, as JSON has it."""
        return {"told": self.told, "wanted": self._wanted}

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
                "node to node; make them the same, or begin anew: delete the application and deploy it again, or give "
                "a training run another output_dir"
            )

    def take_on(self, spec: ServiceSpec) -> dict[str, Any]:
        """What a new description has otherwise than the last one, once. New numbers are pursued from now on.

        What the service was asked for since, by `shoal experts` for one, stays where the descriptions agree.
        """
        now = _changing(spec)
        before = self.told | self._wanted
        news = {name: value for name, value in now.items() if value != before.get(name, value)}
        if news:
            changing = self._wanted if self._change is not None else {}  # these may be there before the new ones
            numbers = {name: now[name] for name in NUMBERS if now[name] != self.told[name] or name in changing}
            if spec.node_resource is not None:
                numbers.pop("hosts", None)
            self.told = now | {name: self.told[name] for name in numbers}
            self._wanted, self._change, self._tries, self._next_s = numbers, None, 0, 0.0
        return news

    def pursue(self, conductor: Conductor, now_s: float) -> bool:
        """See to new numbers, once nothing else is under way; whether `state` is another now."""
        if not self._wanted:
            return False
        if self._change is not None:
            return self._followed(self._change, conductor, now_s)
        if conductor.change is None and conductor.ever_ready and now_s >= self._next_s:
            hosts, replicas = self._wanted.get("hosts"), self._wanted.get("replicas")
            wish = Wish("replicas" if hosts is None else "scale", hosts=hosts, replicas=replicas, why=WHY)
            try:
                self._change = conductor.request(wish, now_s)
            except ChangeRefused as refused:
                if not refused.busy:
                    return self._settled(conductor, now_s, str(refused))
        return False

    def _followed(self, change: Change, conductor: Conductor, now_s: float) -> bool:
        if not change.phase.over:
            return False
        self._change, self._tries, self._next_s = None, self._tries + 1, now_s + AGAIN_S
        if change.phase is Phase.DONE:
            return self._settled(conductor, now_s, None)
        return self._tries >= TRIES and self._settled(conductor, now_s, change.reason or "it was rolled back")

    def _settled(self, conductor: Conductor, now_s: float, failure: str | None) -> bool:
        """Nothing is wanted any more: it is there, or cannot be had."""
        if failure is not None:
            wish = ", ".join(f"{name} {value}" for name, value in self._wanted.items())
            conductor.events.record("redeployment_refused", now_s, wish=wish, reason=failure)
        self.told |= self._wanted
        self._wanted = {}
        return True


def contents_of(checkpoint: Checkpoint) -> str:
    """Hex digits over all tensors' names, shapes and dtypes, what lies over them, and a part of every dense tensor.

    Hosts look after the routed experts' files themselves.
    """
    return hashlib.sha256(f"{checkpoint.fingerprint()} {dense_identity(checkpoint)}".encode()).hexdigest()[:32]


def _fixed(spec: ServiceSpec) -> str:
    fields = asdict(spec)
    return json.dumps({name: fields[name] for name in FIXED}, default=str)  # a tuple that was sent may be a list


def _changing(spec: ServiceSpec) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(spec).items() if name not in (*FIXED, "name")}
    return fields | {"resources": dict(spec.resources)}
