"""What a training worker asks of an expert host, however the host is reached."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from experts.training.host import HostState
from experts.training.messages import BackwardReply, BackwardRequest
from experts.training.spec import ExpertTraining
from model.snapshots.manifest import Shard
from router.holding import Pair
from router.placement import Host


class PendingGradients(Protocol):
    """A backward request on its way."""

    def result(self, timeout_s: float) -> BackwardReply:
        """The reply. Raises HostSlow while it has not come, HostUnavailable when the host was lost, or HostRefused."""

    def release(self) -> None:
        """The reply's tensors are no longer needed, or nobody waits for it any more."""


class Peer(Protocol):
    """One life of one host. Every call but `backward` waits for its end.

    All but that one raise HostUnavailable when the host is lost, HostRefused when it is not where a call needs it, and
    CallRefused when no host could do it.
    """

    def configure(self, training: ExpertTraining) -> None: ...

    def status(self) -> HostState: ...

    def begin(self, step: int, micros: int, ranks: int, pairs: Collection[Pair]) -> None: ...

    def backward(self, request: BackwardRequest) -> PendingGradients: ...

    def squared_norms(self, step: int) -> Mapping[Pair, float]: ...

    def apply(self, step: int, learning_rate: float, grad_scale: float) -> None: ...

    def pull(self, pairs: Collection[Pair], source: Host) -> None:
        """Take over the state of these pairs from another holder."""

    def restart(self, pairs: Collection[Pair]) -> None:
        """Go back to the checkpoint's weights."""

    def save(self, staging: Path, pairs: Collection[Pair], step: int) -> Sequence[Shard]:
        """Write these experts as they are after so many steps into an attempt at a snapshot."""

    def load(self, snapshot: Path, pairs: Collection[Pair]) -> None:
        """Go on from a snapshot."""


class Peers(Protocol):
    """Finds the peer of a host."""

    def peer(self, host: Host) -> Peer:
        """Whether the host is there shows when it is called."""

    def forget(self, host: Host) -> None:
        """Drop what is kept open to a host that failed."""
