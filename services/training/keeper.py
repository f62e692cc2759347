"""A run's snapshots: written while the next step computes, restored by all workers together."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from attention.training.optimizer import DenseOptimizer
from attention.training.parameters import DenseParameters
from attention.training.ranks import Ranks
from experts.errors import ExpertError
from experts.training.coordinator import Coordinator
from experts.training.step_hosts import StepHosts
from model.snapshots.attempt import abandon, abandon_all, begin, commit
from model.snapshots.errors import SnapshotBroken, SnapshotError
from model.snapshots.history import open_newest, prune, set_aside
from model.snapshots.manifest import Json, Manifest, Shard
from model.snapshots.shard_file import write_shard
from model.snapshots.snapshot import Snapshot
from services.training.agree import together
from services.training.identity import Identity, other_training


@dataclass(slots=True)
class _Pending:
    step: int
    cursor: int
    extra: Json
    staging: Path
    dense: "Future[Shard]"
    experts: "Future[list[Shard]] | None"  # where this is worker 0


class Keeper:
    """Every worker has one; each call is made by all of them at the same step."""

    def __init__(
        self,
        root: Path,
        keep: int,
        run_id: str,
        identity: Identity,
        ranks: Ranks,
        dense: DenseParameters,
        optimizer: DenseOptimizer,
        coordinator: Coordinator | None,
        tell: Callable[[str], None],
    ) -> None:
        """`tell` is given what a person should know."""
        self._root = root
        self._keep = keep
        self._run_id = run_id
        self._identity = identity
        self._ranks = ranks
        self._dense = dense
        self._optimizer = optimizer
        self._coordinator = coordinator
        self._tell = tell
        self._pool = ThreadPoolExecutor(2, "snapshot")
        self._pending: _Pending | None = None

    def start(self, hosts: StepHosts, step: int, cursor: int, extra: Json, hindrance: str = "") -> None:
        """Begin to write the state after `step` steps; what is written does not change until it is on disk.

        With a `hindrance`, which worker 0 alone may know of, nothing is written, and `tell` says why.
        """
        message = {}
        if self._coordinator is not None:
            try:
                if hindrance:
                    raise SnapshotError(hindrance)
                message["staging"] = str(begin(self._root, step))
            except SnapshotError as error:
                self._tell(f"no snapshot of step {step}: {error}")
        staging = json.loads(self._ranks.gather(json.dumps(message))[0]).get("staging")
        if staging is None:
            return
        directory = Path(staging)
        dense = self._pool.submit(write_shard, directory, f"dense-{self._ranks.rank}.safetensors", self._share())
        experts = None
        if self._coordinator is not None:
            experts = self._pool.submit(self._coordinator.save, hosts, directory, step)
        self._pending = _Pending(step, cursor, extra, directory, dense, experts)

    def settle(self) -> None:
        """Return when this worker's part is written, and its parameters may be stepped."""
        if self._pending is not None:
            self._pending.dense.exception()

    def finish(self) -> Path | None:
        """Make what was begun a snapshot; None where there is nothing, or it failed, which `tell` says."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        message: dict[str, object] = {}
        try:
            message["shard"] = asdict(pending.dense.result())
        except SnapshotError as error:
            message["failed"] = str(error)
        parts = [json.loads(each) for each in self._ranks.gather(json.dumps(message))]
        if pending.experts is None:
            return None
        try:
            experts = pending.experts.result()
            failed = [part["failed"] for part in parts if "failed" in part]
            if failed:
                raise SnapshotError(failed[0])
            shards = [Shard(**(part["shard"] | {"tensors": tuple(part["shard"]["tensors"])})) for part in parts]
            written = commit(pending.staging, self._manifest(pending, (*shards, *experts)))
        except (SnapshotError, ExpertError) as error:
            self._tell(f"no snapshot of step {pending.step}: {error}")
            self._abandon(pending.staging)
            return None
        try:
            prune(self._root, self._keep)
        except SnapshotError as error:
            self._tell(f"older snapshots stay: {error}")
        return written

    def newest(self) -> Snapshot | None:
        """The newest whole one, every byte of it checked; the same on every worker.

        Raises SnapshotError, on every worker, when it is of another model or run or cannot be looked at.
        """
        message: dict[str, str] = {}
        if self._coordinator is not None:
            try:
                snapshot = self._newest_whole()
            except SnapshotError as error:
                message["failed"] = str(error)
            else:
                message = {"snapshot": str(snapshot.directory)} if snapshot is not None else {}
        answer = json.loads(self._ranks.gather(json.dumps(message))[0])
        if "failed" in answer:
            raise SnapshotError(answer["failed"])
        if "snapshot" not in answer:
            return None
        return together(self._ranks, lambda: Snapshot.open(Path(answer["snapshot"])))

    def _newest_whole(self) -> Snapshot | None:
        abandon_all(self._root)  # whoever wrote them is gone, or went back from there
        while True:
            found = open_newest(self._root)
            for reason in found.skipped:
                self._tell(f"passed over a broken snapshot: {reason}")
            if found.snapshot is None:
                return None
            self._check(found.snapshot)
            try:
                found.snapshot.verify()
            except SnapshotBroken as broken:
                aside = set_aside(found.snapshot.directory)
                self._tell(f"a damaged snapshot was moved to {aside.name}: {broken}")
            else:
                return found.snapshot

    def _check(self, snapshot: Snapshot) -> None:
        identity, manifest = self._identity, snapshot.manifest
        snapshot.check_same_run(fingerprint=identity.model_as(manifest.fingerprint), run_id=self._run_id)
        if changed := other_training(manifest.recipe, identity.recipe):
            raise SnapshotError(
                f"{snapshot.directory} is of another way of training: {changed}; give the same recipe, or another "
                "output_dir"
            )
        if manifest.extra.get("data") != identity.data:
            raise SnapshotError(
                f"{snapshot.directory} was trained on other data, or in another order: its position in them means "
                "nothing here; give the same files and seed, or another output_dir"
            )

    def restore_dense(self, snapshot: Snapshot) -> None:
        """Take this worker's parameters and its share of the optimizer's state; all of them raise SnapshotError."""
        together(self._ranks, lambda: self._restore_mine(snapshot))

    def _restore_mine(self, snapshot: Snapshot) -> None:
        names = list(self._dense.trained)
        values = dict(zip(names, snapshot.tensors(names), strict=True))
        self._dense.restore(values.__getitem__)
        wanted = list(self._optimizer.wanted())
        self._optimizer.restore(dict(zip(wanted, snapshot.tensors(wanted), strict=True)), snapshot.manifest.step)

    def close(self) -> None:
        """Give up what was begun: the run ends."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.dense.exception()
            if pending.experts is not None:
                pending.experts.exception()
                self._abandon(pending.staging)
        self._pool.shutdown()

    def _share(self) -> dict[str, Tensor]:
        mine = [name for name, rank in self._optimizer.owners.items() if rank == self._ranks.rank]
        return {name: self._dense.trained[name].value for name in mine} | self._optimizer.moments()

    def _manifest(self, pending: _Pending, shards: tuple[Shard, ...]) -> Manifest:
        return Manifest(
            step=pending.step,
            run_id=self._run_id,
            fingerprint=self._identity.model,
            position={"cursor": pending.cursor},
            recipe=self._identity.recipe,
            rng={},  # every draw is a function of the recipe's seed and a position
            shards=shards,
            extra={**pending.extra, "data": self._identity.data},
        )

    def _abandon(self, staging: Path) -> None:
        try:
            abandon(staging)
        except SnapshotError as error:
            self._tell(str(error))
