"""Training hosts in the same process."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experts.errors import HostUnavailable
from experts.training.host import HostState, TrainingHost
from experts.training.messages import BackwardReply, BackwardRequest
from experts.training.spec import ExpertTraining
from experts.training.states import load_states, save_states
from model.checkpoint import Checkpoint
from model.snapshots.manifest import Shard
from model.snapshots.snapshot import Snapshot
from router.holding import Pair
from router.placement import Host


@dataclass(frozen=True, slots=True)
class _Call:
    peer: "LocalPeer"
    request: BackwardRequest

    def result(self, timeout_s: float) -> BackwardReply:
        return self.peer.there.backward(self.request)

    def release(self) -> None:
        pass


class LocalPeer:
    """Calls a host directly, if its life is there when it is called."""

    def __init__(self, host: Host, hosts: Mapping[str, TrainingHost], checkpoint: Checkpoint) -> None:
        self._host = host
        self._hosts = hosts
        self._checkpoint = checkpoint

    @property
    def there(self) -> TrainingHost:
        """Raises HostUnavailable when it is not."""
        found = self._hosts.get(self._host.id)
        if found is None or found.host.generation != self._host.generation:
            raise HostUnavailable(f"{self._host.id} is not in this process")
        return found

    def configure(self, training: ExpertTraining) -> None:
        self.there.configure(training)

    def status(self) -> HostState:
        return self.there.status()

    def begin(self, step: int, micros: int, ranks: int, pairs: Collection[Pair]) -> None:
        self.there.begin(step, micros, ranks, pairs)

    def backward(self, request: BackwardRequest) -> _Call:
        return _Call(self, request)

    def squared_norms(self, step: int) -> Mapping[Pair, float]:
        return self.there.squared_norms(step)

    def apply(self, step: int, learning_rate: float, grad_scale: float) -> None:
        self.there.apply(step, learning_rate, grad_scale)

    def pull(self, pairs: Collection[Pair], source: Host) -> None:
        other = LocalPeer(source, self._hosts, self._checkpoint).there
        for pair in pairs:
            with other.reading():
                version, state = other.state(pair)
            self.there.adopt(pair, version, state)

    def restart(self, pairs: Collection[Pair]) -> None:
        self.there.restart(self._checkpoint, pairs)

    def save(self, staging: Path, pairs: Collection[Pair], step: int) -> Sequence[Shard]:
        return save_states(self.there, staging, pairs, step)

    def load(self, snapshot: Path, pairs: Collection[Pair]) -> None:
        load_states(self.there, self._checkpoint, Snapshot.open(snapshot), list(pairs))


class LocalPeers:
    """`hosts` may change while it is in use."""

    def __init__(self, hosts: Mapping[str, TrainingHost], checkpoint: Checkpoint) -> None:
        self._hosts = hosts
        self._checkpoint = checkpoint

    def peer(self, host: Host) -> LocalPeer:
        return LocalPeer(host, self._hosts, self._checkpoint)

    def forget(self, host: Host) -> None:
        pass  # nothing is kept open
